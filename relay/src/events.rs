//! One JSON document a line on stdout: for a person or a program at the other end of a pipe, or the event log that `start` has
//! opened. Whoever reads it, or does not, never holds up a stream.

use std::io::Write;
use std::sync::Mutex;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::config::PROTOCOL;
use crate::connection::lock;

/// The log of a relay never outgrows this; the end record has room kept for it.
const LOG_BYTES: usize = 1 << 20;
const END_BYTES: usize = 16 << 10;
/// Lines that a foreground relay keeps for a slow reader.
const QUEUED_LINES: usize = 4096;
/// How long the end record waits for a reader.
const LAST_WORD: Duration = Duration::from_secs(1);

pub struct Events(Mutex<Inner>);

struct Inner {
    out: Out,
    suppressed: u64,
    /// A line has found no room in the log.
    full: bool,
    ended: bool,
}

enum Out {
    /// A file of our own: writing takes no longer than the page cache does.
    Log { room_bytes: usize },
    /// A pipe or a terminal, which can be full for as long as its reader likes: a thread waits for it.
    Reader { lines: SyncSender<String>, writer: JoinHandle<()> },
}

impl Events {
    /// `log`: stdout is the event log, and bounded.
    pub fn new(log: bool) -> Events {
        let out = if log {
            Out::Log { room_bytes: LOG_BYTES - END_BYTES }
        } else {
            let (lines, queue) = sync_channel::<String>(QUEUED_LINES);
            let writer = std::thread::spawn(move || queue.iter().for_each(|line| write(&line)));
            Out::Reader { lines, writer }
        };
        Events(Mutex::new(Inner { out, suppressed: 0, full: false, ended: false }))
    }

    /// Writes one event, or counts it when there is no room.
    pub fn emit(&self, event: &str, fields: Value) {
        let line = line(event, fields);
        let mut inner = lock(&self.0);
        if inner.ended {
            return;
        }
        let written = match &mut inner.out {
            Out::Log { room_bytes } if line.len() <= *room_bytes => {
                *room_bytes -= line.len();
                write(&line);
                true
            }
            Out::Log { .. } => {
                inner.full = true;
                false
            }
            Out::Reader { lines, .. } => lines.try_send(line).is_ok(),
        };
        inner.suppressed += u64::from(!written);
    }

    /// The same for what each connection says: once the log was full, its fields are not even made.
    pub fn emit_if_room(&self, event: &str, fields: impl FnOnce() -> Value) {
        {
            let mut inner = lock(&self.0);
            if inner.full {
                inner.suppressed += u64::from(!inner.ended);
                return;
            }
        }
        self.emit(event, fields());
    }

    /// Writes the end record and returns it; nothing follows it.
    pub fn end(&self, mut fields: Value) -> Value {
        let mut inner = lock(&self.0);
        fields["suppressed_events"] = json!(inner.suppressed);
        let record = document("end", fields);
        if inner.ended {
            return record;
        }
        inner.ended = true;
        let line = format!("{record}\n");
        match std::mem::replace(&mut inner.out, Out::Log { room_bytes: 0 }) {
            Out::Log { .. } => write(&line),
            Out::Reader { lines, writer } => last_word(line, lines, &writer),
        }
        record
    }
}

/// Hands the last line over and waits for it to be read, for a bounded time.
fn last_word(mut line: String, lines: SyncSender<String>, writer: &JoinHandle<()>) {
    let deadline = Instant::now() + LAST_WORD;
    let pause = || std::thread::sleep(Duration::from_millis(1));
    while let Err(std::sync::mpsc::TrySendError::Full(back)) = lines.try_send(line) {
        if Instant::now() >= deadline {
            return;
        }
        line = back;
        pause();
    }
    drop(lines);
    while !writer.is_finished() && Instant::now() < deadline {
        pause();
    }
}

/// One event as a line with its newline.
pub fn line(event: &str, fields: Value) -> String {
    format!("{}\n", document(event, fields))
}

fn document(event: &str, fields: Value) -> Value {
    let mut document = json!({
        "protocol": PROTOCOL,
        "event": event,
        "at": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
    });
    if let (Some(document), Value::Object(fields)) = (document.as_object_mut(), fields) {
        document.extend(fields);
    }
    document
}

fn write(line: &str) {
    let mut out = std::io::stdout().lock();
    // A full disk or a closed pipe must not end the stream that is being carried.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}
