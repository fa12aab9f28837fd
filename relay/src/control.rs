//! The control socket: one JSON request a connection, one JSON answer. Only the relay's own user, and root, are heard.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Mode as FileMode;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Changes, Config, PROTOCOL, check_seconds};
use crate::relay::{Reason, Relay};
use crate::timer;

const LONGEST_REQUEST_BYTES: u64 = 1 << 20;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
pub const MOST_CLIENTS: usize = 64;

#[derive(Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase", deny_unknown_fields)]
pub enum Verb {
    Status {},
    Update { changes: Changes },
    Renew { lease_s: f64 },
    Drain { deadline_s: f64 },
    Stop { reason: StopReason },
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    Released,
    Admin,
}

/// Binds the socket, for its owner only from the first moment; a runtime can take it over.
pub fn bind(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let before = rustix::process::umask(FileMode::from_raw_mode(0o177));
    let bound = std::os::unix::net::UnixListener::bind(path);
    rustix::process::umask(before);
    bound.and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
}

/// Serves clients until the end record is there, then lets those who wait for it read it.
pub async fn serve(relay: Arc<Relay>, socket: UnixListener) {
    let mut record = relay.record.subscribe();
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _)) if clients.len() < MOST_CLIENTS => {
                    clients.spawn(timer::timeout(Duration::from_secs(60), attend(relay.clone(), stream)));
                }
                Ok(_) => {}
                // A shortage of descriptors: nobody could be answered now.
                Err(_) => timer::sleep(Duration::from_millis(100)).await,
            },
            Some(_) = clients.join_next() => {}
            () = written(&mut record) => break,
        }
    }
    let _ =
        timer::timeout(Duration::from_secs(1), async { while clients.join_next().await.is_some() {} }).await;
}

/// Returns when the end record is there.
async fn written(record: &mut watch::Receiver<Option<Value>>) {
    // The sender lives as long as the relay.
    let _ = record.wait_for(Option::is_some).await;
}

async fn attend(relay: Arc<Relay>, stream: UnixStream) {
    let own = rustix::process::geteuid().as_raw();
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0) {
        return;
    }
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(LONGEST_REQUEST_BYTES));
    let answer = match timer::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await {
        Ok(Ok(_)) => answer(&relay, &line).await,
        _ => return,
    };
    // A client that has gone away does not get its answer; what it asked for has been done.
    let _ = writer.write_all(format!("{answer}\n").as_bytes()).await;
}

/// What a request asks of a relay with this configuration, checked; or the answer that refuses it.
pub fn parse(line: &str, config: &Config) -> Result<Verb, Value> {
    let refused = |code: &str, message: String| json!({"protocol": PROTOCOL, "error": {"code": code, "message": message}});
    let bad = |message: String| refused("bad-request", message);
    let mut request: Value =
        serde_json::from_str(line).map_err(|error| bad(format!("control request: {error}")))?;
    // Before the verb: another protocol may have other verbs, and that is the mistake to report.
    let protocol =
        request.as_object_mut().and_then(|fields| fields.remove("protocol")).unwrap_or(Value::Null);
    if protocol != json!(PROTOCOL) {
        return Err(refused(
            "protocol",
            format!("protocol {protocol} was asked, this s2ds speaks protocol {PROTOCOL}"),
        ));
    }
    let verb = serde_json::from_value(request).map_err(|error| bad(format!("control request: {error}")))?;
    match &verb {
        Verb::Status {} | Verb::Stop { .. } => Ok(()),
        Verb::Update { changes } => changes.check(config),
        Verb::Renew { lease_s } => check_seconds("lease_s", *lease_s, 0.1),
        Verb::Drain { deadline_s } => check_seconds("deadline_s", *deadline_s, 0.0),
    }
    .map_err(bad)?;
    Ok(verb)
}

async fn answer(relay: &Relay, line: &str) -> Value {
    match parse(line, &relay.config) {
        Err(refusal) => return refusal,
        Ok(Verb::Status {}) => {}
        Ok(Verb::Update { changes }) => relay.update(changes),
        Ok(Verb::Renew { lease_s }) => relay.renew(lease_s, true),
        Ok(Verb::Drain { deadline_s }) => relay.drain(Duration::from_secs_f64(deadline_s), Reason::Released),
        Ok(Verb::Stop { reason }) => {
            let reason = match reason {
                StopReason::Released => Reason::Released,
                StopReason::Admin => Reason::Admin,
            };
            relay.end(reason, None, false);
            let mut record = relay.record.subscribe();
            written(&mut record).await;
            return record.borrow().clone().unwrap_or(Value::Null);
        }
    }
    relay.status()
}
