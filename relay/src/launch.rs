//! `s2ds start`: leaves a relay behind that belongs to nobody's session, and returns when it is ready or has failed.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use crate::config::Config;
use crate::errno;
use crate::events;
use crate::runtime_dir::RuntimeDir;

const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// Starts this same binary as `run --detached` with its events in the log file, and relays its first word. Because we return
/// at once, the relay's parent is init: it survives the worker, engine or SSH session that called us.
pub fn start(configuration: &[u8], directory: &Path) -> ExitCode {
    let failed = |exit: u8, code: &str, errno: Option<String>, message: String| {
        eprintln!("s2ds: {message}");
        print!("{}", events::line("failed", json!({"code": code, "errno": errno, "message": message})));
        ExitCode::from(exit)
    };
    let config = match Config::parse(configuration) {
        Ok(config) => config,
        Err(message) => return failed(64, "bad-config", None, message),
    };
    let dir = match RuntimeDir::enter(directory) {
        Ok(dir) => dir,
        Err(message) => return failed(1, "io", None, message),
    };
    let log = match dir.create_log(&config.relay_id) {
        Ok(log) => log,
        Err(error) => {
            let message = format!("event log of relay {}: {error}", config.relay_id);
            return failed(1, "io", Some(errno::of(&error)), message);
        }
    };
    // What our caller left open would stay open as long as the relay lives: its pipe would never end. Before Linux 5.11 the
    // call is missing, and callers that close what they own (Python does) are still served.
    let _ = s2ds_sys::close_on_exec_from(3);
    let spawned = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(["run", "--detached", "--runtime-dir", "."])
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(Stdio::piped())
            .spawn()
    });
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            let _ = std::fs::remove_file(dir.log(&config.relay_id));
            return failed(1, "io", Some(errno::of(&error)), format!("cannot start the relay: {error}"));
        }
    };
    if let Some(mut stdin) = child.stdin.take() {
        // A child that dies before it has read this says so on the other pipe, or by its end.
        let _ = stdin.write_all(configuration);
    }
    let mut word = String::new();
    if let Some(stderr) = child.stderr.take() {
        let timeout = Timespec { tv_sec: READY_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&stderr, PollFlags::IN)], Some(&timeout)).is_ok_and(|ready| ready > 0) {
            let _ = BufReader::new(stderr).read_line(&mut word);
        }
    }
    if word.contains("\"event\":\"ready\"") {
        print!("{word}");
        return ExitCode::SUCCESS;
    }
    let _ = child.kill();
    let status = child.wait();
    let _ = std::fs::remove_file(dir.log(&config.relay_id));
    let _ = std::fs::remove_file(dir.socket(&config.relay_id));
    if word.contains("\"event\":\"failed\"") {
        print!("{word}");
        eprintln!("s2ds: the relay did not start");
        return ExitCode::from(1);
    }
    failed(1, "io", None, format!("the relay ended before it was ready: {status:?} {}", word.trim()))
}
