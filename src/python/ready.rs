//! An outcome that is known already, in the shape of a coroutine.
//!
//! `safe_emit` accepts the event at the call, so what it returns has nothing left to do: awaiting it must cost nothing
//! and touch no event loop. It has `__await__`, `send`, `throw` and `close`, which makes it a
//! `collections.abc.Coroutine`: `create_task`, `gather`, `wait_for`, `TaskGroup` take it. Each call gives a fresh
//! object, since `as_completed` would count a shared one once.
//!
//! A type made by pyo3 cannot fill the `am_send` slot and costs some 200 ns per await; with the slot it is 30–60 ns
//! (`docs/decisions/0004-ready-awaitable.md`). That is the one reason for the unsafe code here.
#![expect(unsafe_code, reason = "the am_send slot can only be filled through the C API; see the module's comment")]

use std::ffi::{c_int, c_void};
use std::ptr;

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// An instance: the object head, and a borrowed pointer to `True` or `False`, which live as long as the interpreter.
#[repr(C)]
struct Ready {
    head: ffi::PyObject,
    value: *mut ffi::PyObject,
}

static TYPE: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// A fresh awaitable that is done and gives `value`.
pub(super) fn ready(py: Python<'_>, value: bool) -> PyResult<Bound<'_, PyAny>> {
    let kind = TYPE.get_or_try_init(py, || make_type(py))?.as_ptr().cast::<ffi::PyTypeObject>();
    // SAFETY: the GIL is held (`py`); `kind` is a heap type with `Ready`'s size, so the allocation is large enough to
    // write `value`, and `PyType_GenericAlloc` returns a new reference or null with an exception set.
    unsafe {
        let object = ffi::PyType_GenericAlloc(kind, 0);
        if object.is_null() {
            return Err(PyErr::fetch(py));
        }
        (*object.cast::<Ready>()).value = if value { ffi::Py_True() } else { ffi::Py_False() };
        Ok(Bound::from_owned_ptr(py, object))
    }
}

fn make_type(py: Python<'_>) -> PyResult<Py<PyType>> {
    // The interpreter keeps pointers to the method table for ever: it is leaked, once per process.
    let methods = Box::leak(Box::new([
        method(c"send", send, ffi::METH_O),
        method(c"throw", throw, ffi::METH_VARARGS),
        method(c"close", close, ffi::METH_NOARGS),
        ffi::PyMethodDef::zeroed(),
    ]));
    let slot = |slot: c_int, pfunc: *mut c_void| ffi::PyType_Slot { slot, pfunc };
    let mut slots = [
        slot(ffi::Py_tp_dealloc, dealloc as *mut c_void),
        slot(ffi::Py_am_await, itself as *mut c_void),
        slot(ffi::Py_tp_iter, itself as *mut c_void),
        slot(ffi::Py_tp_iternext, next as *mut c_void),
        slot(ffi::Py_am_send, am_send as *mut c_void),
        slot(ffi::Py_tp_methods, methods.as_mut_ptr().cast()),
        slot(0, ptr::null_mut()),
    ];
    let size = c_int::try_from(size_of::<Ready>()).map_err(|_| PyRuntimeError::new_err("impossible size"))?;
    let mut spec = ffi::PyType_Spec {
        name: c"safe_broadcaster._core.Ready".as_ptr(),
        basicsize: size,
        itemsize: 0,
        // An instance made by Python would hold no value, and awaiting it would crash.
        flags: (ffi::Py_TPFLAGS_DEFAULT | ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION) as _,
        slots: slots.as_mut_ptr(),
    };
    // SAFETY: `spec` and `slots` are valid for the call, which copies them; every function has the slot's signature.
    unsafe {
        let kind = ffi::PyType_FromSpec(&raw mut spec);
        Ok(Bound::from_owned_ptr_or_err(py, kind)?.cast_into::<PyType>()?.unbind())
    }
}

fn method(name: &'static std::ffi::CStr, function: ffi::PyCFunction, flags: c_int) -> ffi::PyMethodDef {
    ffi::PyMethodDef {
        ml_name: name.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunction: function },
        ml_flags: flags,
        ml_doc: ptr::null(),
    }
}

// SAFETY of all functions below: Python calls them with the GIL held and `object` a live instance of this type.

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    unsafe {
        let kind = ffi::Py_TYPE(object);
        ffi::PyObject_Free(object.cast());
        ffi::Py_DECREF(kind.cast()); // an instance of a heap type owns a reference to it
    }
}

unsafe extern "C" fn itself(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    unsafe {
        ffi::Py_INCREF(object);
    }
    object
}

unsafe extern "C" fn am_send(
    object: *mut ffi::PyObject,
    _sent: *mut ffi::PyObject,
    result: *mut *mut ffi::PyObject,
) -> ffi::PySendResult {
    unsafe {
        let value = (*object.cast::<Ready>()).value;
        ffi::Py_INCREF(value);
        *result = value;
    }
    ffi::PySendResult::PYGEN_RETURN
}

unsafe extern "C" fn next(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    unsafe {
        ffi::PyErr_SetObject(ffi::PyExc_StopIteration, (*object.cast::<Ready>()).value);
    }
    ptr::null_mut()
}

unsafe extern "C" fn send(object: *mut ffi::PyObject, _sent: *mut ffi::PyObject) -> *mut ffi::PyObject {
    unsafe { next(object) }
}

/// `throw(exception)` or `throw(type[, value[, traceback]])`: raises it, as a coroutine that is done would.
unsafe extern "C" fn throw(_object: *mut ffi::PyObject, args: *mut ffi::PyObject) -> *mut ffi::PyObject {
    unsafe {
        let count = ffi::PyTuple_Size(args);
        if count < 1 {
            ffi::PyErr_SetString(ffi::PyExc_TypeError, c"throw() takes an exception".as_ptr());
            return ptr::null_mut();
        }
        let first = ffi::PyTuple_GetItem(args, 0);
        if ffi::PyExceptionInstance_Check(first) != 0 {
            ffi::PyErr_SetObject(ffi::Py_TYPE(first).cast(), first);
        } else if ffi::PyExceptionClass_Check(first) != 0 {
            let value = if count > 1 { ffi::PyTuple_GetItem(args, 1) } else { ffi::Py_None() };
            ffi::PyErr_SetObject(first, value);
        } else {
            ffi::PyErr_SetString(ffi::PyExc_TypeError, c"throw() takes an exception".as_ptr());
        }
    }
    ptr::null_mut()
}

unsafe extern "C" fn close(_object: *mut ffi::PyObject, _none: *mut ffi::PyObject) -> *mut ffi::PyObject {
    unsafe { ffi::Py_NewRef(ffi::Py_None()) }
}
