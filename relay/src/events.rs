//! One JSON document a line on stdout: for a person at a terminal, or the event log that `start` has opened.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::config::PROTOCOL;

/// The log of a relay never outgrows this; the end record has room kept for it.
const LOG_BYTES: u64 = 1 << 20;
const END_BYTES: u64 = 16 << 10;

pub struct Events {
    /// None: a foreground relay, whose reader takes what it wants.
    limit_bytes: Option<u64>,
    written_bytes: AtomicU64,
    suppressed: AtomicU64,
    ended: AtomicBool,
    /// One line at a time, and nothing after the end record.
    line: Mutex<()>,
}

impl Events {
    pub fn new(bounded: bool) -> Events {
        Events {
            limit_bytes: bounded.then_some(LOG_BYTES - END_BYTES),
            written_bytes: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            line: Mutex::new(()),
        }
    }

    /// Writes one event, or counts it when the log is full. A reader that has gone away does not stop a relay.
    pub fn emit(&self, event: &str, fields: Value) {
        let line = line(event, fields);
        let _one_at_a_time = self.line.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        let length = line.len() as u64;
        if self.limit_bytes.is_some_and(|limit| self.written_bytes.load(Ordering::Relaxed) + length > limit) {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.written_bytes.fetch_add(length, Ordering::Relaxed);
        write(&line);
    }

    /// Writes the end record and returns it; nothing follows it.
    pub fn end(&self, mut fields: Value) -> Value {
        fields["suppressed_events"] = json!(self.suppressed.load(Ordering::Relaxed));
        let record = document("end", fields);
        let _one_at_a_time = self.line.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !self.ended.swap(true, Ordering::Relaxed) {
            write(&format!("{record}\n"));
        }
        record
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
