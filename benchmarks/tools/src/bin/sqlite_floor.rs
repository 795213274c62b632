//! How fast plain `SQLite` takes, and gives back, the standard event: the floor that the spill is compared with.
//!
//! `sqlite_floor --events FILE --db FILE [--rows 1000000] [--write-batch 1000] [--read-batch 1000]` stores the lines of
//! `--events` in turn (WAL, synchronous NORMAL, one prepared INSERT, `--write-batch` rows a transaction), then reads them
//! oldest first and deletes them, `--read-batch` rows a transaction, until none is left. The file must not exist; it is removed.
//! Without `--db` it only prints the version of its `SQLite`.

use std::time::Instant;

use benchmark_tools::option;
use rusqlite::{Connection, Result, params};

const SCHEMA: &str = "CREATE TABLE event (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body BLOB NOT NULL)";

fn main() -> Result<()> {
    let db = option("db", String::new());
    if db.is_empty() {
        println!(r#"{{"sqlite":"{}"}}"#, rusqlite::version());
        return Ok(());
    }
    let events_path = option("events", String::new());
    let rows: u32 = option("rows", 1_000_000);
    let write_batch: u32 = option("write-batch", 1000);
    let read_batch: u32 = option("read-batch", 1000);
    let text = std::fs::read_to_string(&events_path).expect("--events: a file of JSON lines");
    let events: Vec<&str> = text.lines().collect();
    assert!(!std::path::Path::new(&db).exists(), "--db: {db} exists");

    let mut connection = Connection::open(&db)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.execute_batch(SCHEMA)?;

    let began = Instant::now();
    insert(&mut connection, &events, rows, write_batch)?;
    let insert = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let (read, bytes) = read_and_delete(&mut connection, read_batch)?;
    let drain = began.elapsed().as_secs_f64();
    assert_eq!(read, rows, "every row comes back");

    drop(connection);
    for suffix in ["", "-wal", "-shm"] {
        // The last two are gone already when SQLite could close cleanly.
        std::fs::remove_file(format!("{db}{suffix}")).ok();
    }
    println!(
        r#"{{"rows":{rows},"bytes":{bytes},"insert_per_s":{:.0},"read_delete_per_s":{:.0},"sqlite":"{}"}}"#,
        f64::from(rows) / insert,
        f64::from(rows) / drain,
        rusqlite::version()
    );
    Ok(())
}

fn insert(connection: &mut Connection, events: &[&str], rows: u32, batch: u32) -> Result<()> {
    let mut next = 0;
    while next < rows {
        let transaction = connection.transaction()?;
        {
            let mut statement = transaction.prepare_cached("INSERT INTO event (at, body) VALUES (?1, ?2)")?;
            for row in next..rows.min(next + batch) {
                statement.execute(params![row, events[row as usize % events.len()].as_bytes()])?;
            }
        }
        transaction.commit()?;
        next += batch;
    }
    Ok(())
}

fn read_and_delete(connection: &mut Connection, batch: u32) -> Result<(u32, usize)> {
    let (mut count, mut bytes) = (0, 0);
    loop {
        let transaction = connection.transaction()?;
        let mut last = None;
        {
            let mut statement = transaction.prepare_cached("SELECT seq, body FROM event ORDER BY seq LIMIT ?1")?;
            let mut found = statement.query([batch])?;
            while let Some(row) = found.next()? {
                last = Some(row.get::<_, i64>(0)?);
                bytes += row.get_ref(1)?.as_blob()?.len();
                count += 1;
            }
        }
        let Some(last) = last else { return Ok((count, bytes)) };
        transaction.prepare_cached("DELETE FROM event WHERE seq <= ?1")?.execute([last])?;
        transaction.commit()?;
    }
}
