//! The verbs that speak to a relay's control socket, and what is known of a relay that has gone.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use crate::config::{PROTOCOL, RelayId};
use crate::runtime_dir::RuntimeDir;

/// A living relay answers in milliseconds, also under load; `stop` waits for its connections to close their books.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const EXIT_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A refusal as it is printed.
#[derive(Debug)]
pub struct Refusal {
    pub code: String,
    pub message: String,
}

impl Refusal {
    pub fn new(code: &str, message: impl Into<String>) -> Refusal {
        Refusal { code: code.into(), message: message.into() }
    }

    pub fn document(&self) -> Value {
        json!({"protocol": PROTOCOL, "error": {"code": self.code, "message": self.message}})
    }
}

/// Sends one request to a living relay, or reports how it ended. `ended_is_fine`: the end record is an answer and no error.
pub fn ask(
    dir: &RuntimeDir,
    relay_id: &RelayId,
    request: Value,
    ended_is_fine: bool,
) -> Result<Value, Refusal> {
    match UnixStream::connect(dir.socket(relay_id)) {
        Ok(stream) => match converse(stream, &request) {
            // It ended while we spoke; its log says how.
            Err(error) if error.code == "io" => past(dir, relay_id).map_err(|_| error),
            answer => answer,
        },
        Err(_) => {
            let record = past(dir, relay_id)?;
            if ended_is_fine {
                Ok(record)
            } else {
                let reason = record["reason"].as_str().unwrap_or("unknown");
                Err(Refusal::new("no-such-relay", format!("relay {relay_id} has ended: {reason}")))
            }
        }
    }
}

fn converse(mut stream: UnixStream, request: &Value) -> Result<Value, Refusal> {
    let io = |error: std::io::Error| Refusal::new("io", format!("control socket: {error}"));
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok();
    let process = peer.and_then(|peer| pidfd_open(peer.pid, PidfdFlags::empty()).ok());
    let stops = request["verb"] == "stop";
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(io)?;
    stream.write_all(format!("{request}\n").as_bytes()).map_err(io)?;
    let mut line = String::new();
    match BufReader::new(&stream).read_line(&mut line) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            let Some(process) = process.filter(|_| stops) else {
                return Err(Refusal::new(
                    "silent",
                    "the relay does not answer: it is frozen or the machine is overloaded",
                ));
            };
            // Its ports and connections must not outlive a release. The kernel resets the connections.
            let _ = pidfd_send_signal(&process, Signal::KILL);
            wait_for_exit(&process);
            return Err(Refusal::new("relay-lost", "the relay did not answer and was killed"));
        }
        Err(error) => return Err(io(error)),
    }
    let answer: Value = serde_json::from_str(&line)
        .map_err(|error| Refusal::new("io", format!("control socket: the answer is no document: {error}")))?;
    if let Some(error) = answer.get("error") {
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        return Err(Refusal { code: text("code"), message: text("message") });
    }
    if let Some(process) = process.filter(|_| stops) {
        // Ports and sockets are free only when the process is gone.
        wait_for_exit(&process);
    }
    Ok(answer)
}

fn wait_for_exit(process: &OwnedFd) {
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&EXIT_TIMEOUT));
}

/// The end record from the log of a relay that is not there any more.
pub fn past(dir: &RuntimeDir, relay_id: &RelayId) -> Result<Value, Refusal> {
    let mut text = String::new();
    let read = fs::File::open(dir.log(relay_id)).and_then(|mut log| log.read_to_string(&mut text));
    if read.is_err() {
        return if dir.socket(relay_id).exists() {
            Err(lost(relay_id))
        } else {
            Err(Refusal::new("no-such-relay", format!("no relay {relay_id} is known here")))
        };
    }
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|event| event["event"] == "end")
        .ok_or_else(|| lost(relay_id))
}

fn lost(relay_id: &RelayId) -> Refusal {
    Refusal::new("relay-lost", format!("relay {relay_id} is gone and has left no end record: it was killed"))
}

/// Removes what a relay that has ended left behind.
pub fn forget(dir: &RuntimeDir, relay_id: &RelayId) -> Result<Value, Refusal> {
    if UnixStream::connect(dir.socket(relay_id)).is_ok() {
        return Err(Refusal::new("bad-request", format!("relay {relay_id} is alive; stop it first")));
    }
    if !dir.socket(relay_id).exists() && !dir.log(relay_id).exists() {
        return Err(Refusal::new("no-such-relay", format!("no relay {relay_id} is known here")));
    }
    for path in [dir.socket(relay_id), dir.log(relay_id)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Refusal::new("io", format!("{}: {error}", path.display())));
            }
            _ => {}
        }
    }
    Ok(json!({"protocol": PROTOCOL, "relay_id": relay_id, "forgotten": true}))
}

/// Every relay that has left a trace here.
pub fn list(dir: &RuntimeDir) -> Result<Value, Refusal> {
    let relays = dir.relays().map_err(|error| Refusal::new("io", format!("runtime directory: {error}")))?;
    let rows: Vec<Value> = relays
        .iter()
        .map(|relay_id| {
            let pid = UnixStream::connect(dir.socket(relay_id))
                .ok()
                .and_then(|stream| rustix::net::sockopt::socket_peercred(&stream).ok())
                .map(|peer| Pid::as_raw(Some(peer.pid)));
            json!({"relay_id": relay_id, "alive": pid.is_some(), "pid": pid})
        })
        .collect();
    Ok(json!({"protocol": PROTOCOL, "relays": rows}))
}
