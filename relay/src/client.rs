//! The verbs that speak to a relay's control socket, and what is known of a relay that has gone.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::{PROTOCOL, RelayId};
use crate::runtime_dir::RuntimeDir;

/// A living relay answers in milliseconds, also under load; `stop` waits for its connections to close their books.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// For those who only look whether a relay is there.
const LOOK_TIMEOUT: Duration = Duration::from_millis(100);
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
    match connect(dir, relay_id, ANSWER_TIMEOUT) {
        Ok(stream) => match converse(stream, &request) {
            // It ended while we spoke; its log says how.
            Err(error) if error.code == "io" => past(dir, relay_id).map_err(|_| error),
            answer => answer,
        },
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(give_up(stops(&request).then(|| logged_process(dir, relay_id)).flatten()))
        }
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

/// A frozen relay accepts nobody, and some day as many wait for it as may: WouldBlock then, and not for ever. The time-out
/// holds for writing, too.
fn connect(dir: &RuntimeDir, relay_id: &RelayId, timeout: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.cloexec(), None)?;
    socket.set_write_timeout(Some(timeout))?;
    socket.connect(&SockAddr::unix(dir.socket(relay_id))?)?;
    Ok(OwnedFd::from(socket).into())
}

/// Whether somebody listens there, frozen or not.
fn is_alive(connected: &io::Result<UnixStream>) -> bool {
    connected.as_ref().err().is_none_or(|error| error.kind() == io::ErrorKind::WouldBlock)
}

fn stops(request: &Value) -> bool {
    request["verb"] == "stop"
}

/// The process of a relay whose socket takes nobody any more, by its own word: somebody listens there, so it lives and its
/// number is still its own. It must be of this program, because in another container the number is another's.
fn logged_process(dir: &RuntimeDir, relay_id: &RelayId) -> Option<OwnedFd> {
    let log = fs::read_to_string(dir.log(relay_id)).ok()?;
    let ready = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let pid = ready.filter(|event| event["event"] == "ready").find_map(|event| event["pid"].as_i64())?;
    let process = pidfd_open(Pid::from_raw(pid.try_into().ok()?)?, PidfdFlags::empty()).ok()?;
    let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    (name(&pid.to_string())? == name("self")?).then_some(process)
}

/// Of a relay that does not answer; `process` only if it is to end. Its ports and connections must not outlive a release. The
/// kernel resets the connections.
fn give_up(process: Option<OwnedFd>) -> Refusal {
    let Some(process) = process else {
        return Refusal::new(
            "silent",
            "the relay does not answer: it is frozen or the machine is overloaded",
        );
    };
    let _ = pidfd_send_signal(&process, Signal::KILL);
    wait_for_exit(&process);
    Refusal::new("relay-lost", "the relay did not answer and was killed")
}

fn converse(mut stream: UnixStream, request: &Value) -> Result<Value, Refusal> {
    let io = |error: io::Error| Refusal::new("io", format!("control socket: {error}"));
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok();
    let process = peer.and_then(|peer| pidfd_open(peer.pid, PidfdFlags::empty()).ok());
    let process = process.filter(|_| stops(request));
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(io)?;
    let mut line = String::new();
    let answered = stream
        .write_all(format!("{request}\n").as_bytes())
        .and_then(|()| BufReader::new(&stream).read_line(&mut line));
    match answered {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(give_up(process)),
        Err(error) => return Err(io(error)),
    }
    let answer: Value = serde_json::from_str(&line)
        .map_err(|error| Refusal::new("io", format!("control socket: the answer is no document: {error}")))?;
    if let Some(error) = answer.get("error") {
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        return Err(Refusal { code: text("code"), message: text("message") });
    }
    if let Some(process) = process {
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
    // One whose socket somebody has removed still holds its log.
    if dir.holder(relay_id).is_some() || is_alive(&connect(dir, relay_id, LOOK_TIMEOUT)) {
        return Err(Refusal::new("bad-request", format!("relay {relay_id} is alive; stop it first")));
    }
    if !dir.socket(relay_id).exists() && !dir.log(relay_id).exists() {
        return Err(Refusal::new("no-such-relay", format!("no relay {relay_id} is known here")));
    }
    for path in [dir.socket(relay_id), dir.log(relay_id)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Refusal::new("io", format!("{}: {error}", path.display())));
            }
            _ => {}
        }
    }
    Ok(json!({"protocol": PROTOCOL, "relay_id": relay_id, "forgotten": true}))
}

/// Every relay that has left a trace here. Asked every second, also of a thousand of them: none of those that hold their logs
/// is spoken to.
pub fn list(dir: &RuntimeDir) -> Result<Value, Refusal> {
    let relays = dir.relays().map_err(|error| Refusal::new("io", format!("runtime directory: {error}")))?;
    let rows: Vec<Value> = relays
        .iter()
        .map(|relay_id| {
            if let Some(pid) = dir.holder(relay_id) {
                let pid = Some(pid).filter(|pid| *pid > 0);
                return json!({"relay_id": relay_id, "alive": true, "pid": pid});
            }
            let stream = connect(dir, relay_id, LOOK_TIMEOUT);
            let alive = is_alive(&stream);
            let peer = stream.ok().and_then(|stream| rustix::net::sockopt::socket_peercred(&stream).ok());
            json!({"relay_id": relay_id, "alive": alive, "pid": peer.map(|peer| Pid::as_raw(Some(peer.pid)))})
        })
        .collect();
    Ok(json!({"protocol": PROTOCOL, "relays": rows}))
}
