"""``safe-broadcaster demo``: a hub that is killed twice, three engines, a page, and a count that must end in zeros.

::

    show      starts everything, kills the hub, draws the progress
    ├── engine      one process each: walks the import graph and emits it
    │   ├── modules     which modules there are, and what each imports
    │   └── pace        when the next event is due
    ├── subscriber  reads the hub as any client would (over websocket, RFC 6455)
    └── verdict     counts what arrived, from the events' own contents
"""
