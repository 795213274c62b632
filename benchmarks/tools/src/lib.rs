//! Shared by the tools: options of the form `--name value`, and an end that follows the parent's.

use std::io::Read;
use std::str::FromStr;

/// The value after `--name`, or `default` where the option is absent.
///
/// # Panics
/// When the value is absent or cannot be read as a `T`: these are tools, a message and an exit are enough.
pub fn option<T: FromStr>(name: &str, default: T) -> T {
    let flag = format!("--{name}");
    let mut arguments = std::env::args().skip_while(|argument| *argument != flag);
    match (arguments.next(), arguments.next()) {
        (None, _) => default,
        (Some(_), Some(value)) => value.parse().unwrap_or_else(|_| panic!("{flag}: cannot read {value:?}")),
        (Some(_), None) => panic!("{flag} needs a value"),
    }
}

/// Ends this process when its standard input closes, so that no tool outlives the script that started it.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut byte = [0];
        while std::io::stdin().read(&mut byte).is_ok_and(|n| n > 0) {}
        std::process::exit(0);
    });
}
