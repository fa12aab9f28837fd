//! s2ds, the SciStream data server: one process relays one role of one stream. `main` reads as its life.

mod carry;
mod client;
pub mod config;
mod confine;
mod congestion;
mod connection;
mod cons;
pub mod control;
mod errno;
mod events;
mod gather;
mod gauge;
mod hkdf;
mod inspect;
pub mod key;
mod ktls;
mod launch;
mod listen;
mod pace;
mod pipe;
pub mod preamble;
mod prod;
pub mod record;
mod relay;
mod resources;
mod resumption;
mod runtime_dir;
mod socket;
mod splice;
mod supervise;
mod timer;
pub mod tls;
mod tls_copy;
mod workers;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::Refusal;
use crate::config::{Config, Mode, PROTOCOL, RelayId, Role};
use crate::congestion::Congestion;
use crate::events::Events;
use crate::key::{Ciphers, Identity};
use crate::ktls::KernelTls;
use crate::relay::{End, Reason, Relay, State};
use crate::runtime_dir::RuntimeDir;
use crate::socket::TcpListener;
use crate::timer::Clock;
use crate::workers::Workers;

const USAGE: &str = "\
Usage: s2ds COMMAND [--runtime-dir DIR]

  start                         start a relay from the JSON on stdin, in the background
  run                           the same in the foreground, events on stdout
  status RELAY_ID               what it does, or how it ended
  update RELAY_ID               change targets, peers, sources, lease_s or rate_mbits_per_s: JSON on stdin
  renew RELAY_ID --lease-s N    extend its lease
  drain RELAY_ID [--deadline-s N]
  stop RELAY_ID [--reason released|admin]
  forget RELAY_ID               remove the log of a relay that has ended
  list                          the relays of this runtime directory
  inspect                       facts about this node: a request as JSON on stdin
  version [--format json]

docs/relay.md describes every document.
";

const EXIT_FAILED: u8 = 1;
const EXIT_CUT: u8 = 3;
const EXIT_USAGE: u8 = 64;
/// No configuration is longer than this.
const LONGEST_CONFIGURATION_BYTES: u64 = 4 << 20;
/// After the end, how long connections have to close their books.
const CLOSING: Duration = Duration::from_secs(1);
/// Unless the configuration says otherwise.
const MOST_WORKERS: usize = 4;
/// A core carries about 18 Gbit/s: six of them an interface of 100.
const MOST_WORKERS_OF_TLS: usize = 8;

/// The commands of docs/relay.md.
pub fn main() -> ExitCode {
    let arguments = match Arguments::parse() {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("s2ds: {message}\n\n{USAGE}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let directory = RuntimeDir::choose(arguments.runtime_dir.clone());
    match arguments.command.as_str() {
        "start" => launch::start(&read_stdin(), &directory),
        "run" => run(&read_stdin(), &directory, arguments.detached),
        "version" => {
            let version = env!("CARGO_PKG_VERSION");
            if arguments.json {
                println!("{}", json!({"name": "s2ds", "version": version, "protocol": PROTOCOL}));
            } else {
                println!("s2ds {version} (protocol {PROTOCOL})");
            }
            ExitCode::SUCCESS
        }
        "help" => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => match command(&arguments, &directory) {
            Ok(document) => {
                println!("{document}");
                ExitCode::SUCCESS
            }
            Err(refusal) => {
                println!("{}", refusal.document());
                eprintln!("s2ds: {}", refusal.message);
                ExitCode::from(EXIT_FAILED)
            }
        },
    }
}

/// The verbs of a control client.
fn command(arguments: &Arguments, directory: &Path) -> Result<Value, Refusal> {
    if arguments.command == "inspect" {
        return inspect::inspect(&read_stdin(), directory);
    }
    let dir = RuntimeDir::enter(directory).map_err(|message| Refusal::new("io", message))?;
    let request = |verb: &str, field: &str, value: Value| {
        let mut request = json!({"protocol": PROTOCOL, "verb": verb});
        if !field.is_empty() {
            request[field] = value;
        }
        request
    };
    let Some(relay_id) = &arguments.relay_id else { return client::list(&dir) };
    match arguments.command.as_str() {
        "status" => client::ask(&dir, relay_id, request("status", "", Value::Null), true),
        "update" => {
            let changes: Value = serde_json::from_slice(&read_stdin())
                .map_err(|error| Refusal::new("bad-request", format!("changes on stdin: {error}")))?;
            client::ask(&dir, relay_id, request("update", "changes", changes), false)
        }
        "renew" => client::ask(&dir, relay_id, request("renew", "lease_s", json!(arguments.lease_s)), false),
        "drain" => {
            client::ask(&dir, relay_id, request("drain", "deadline_s", json!(arguments.deadline_s)), true)
        }
        "stop" => client::ask(&dir, relay_id, request("stop", "reason", json!(arguments.reason)), true),
        _ => client::forget(&dir, relay_id),
    }
}

/// The life of a relay: read, bind, say ready, serve, end.
fn run(configuration: &[u8], directory: &Path, detached: bool) -> ExitCode {
    if detached {
        // Fails only for a leader of a group, which a detached relay is not.
        let _ = rustix::process::setsid();
    }
    let events = Arc::new(Events::new(detached));
    // Detached, stdout is the log and stderr the launcher, who reads one line and leaves.
    let say = |event: &str, fields: Value| {
        events.emit(event, fields.clone());
        if detached {
            // A launcher that has died meanwhile reads nothing.
            let _ = std::io::stderr().write_all(events::line(event, fields).as_bytes());
        }
    };
    let failed = |exit: u8, code: &str, errno: Option<&str>, message: &str| {
        let fields = json!({"code": code, "errno": errno, "message": message});
        if detached {
            say("failed", fields);
        } else {
            // By ourselves: the thread that writes for a slow reader would not live to do it.
            let _ = std::io::stdout().write_all(events::line("failed", fields).as_bytes());
            eprintln!("s2ds: {message}");
        }
        ExitCode::from(exit)
    };
    let config = match Config::parse(configuration) {
        Ok(config) => config,
        Err(message) => return failed(EXIT_USAGE, "bad-config", None, &message),
    };
    let dir = match RuntimeDir::enter(directory) {
        Ok(dir) => dir,
        Err(message) => return failed(EXIT_FAILED, "io", None, &message),
    };
    if detached {
        runtime_dir::hold_log();
    }
    raise_descriptor_limit();
    let workers = match config.workers {
        // What nobody has asked for is no reason not to start.
        0 => (1..=usual_workers(config.mode)).rev().find(|count| fits(&config, *count)).unwrap_or(1),
        chosen => chosen,
    };
    let descriptors = listen::descriptors(&config, workers);
    if let (needed, Some(limit)) = descriptors
        && needed > limit
    {
        let message = format!(
            "{} listeners (num_conn) of {} connections (max_connections) may come to need {needed} descriptors, and a \
             relay may have {limit} (ulimit -Hn): ask for less, or raise the limit",
            config.listen.indices.len(),
            config.max_connections
        );
        return failed(EXIT_FAILED, "limits", Some("EMFILE"), &message);
    }
    pipe::allow(listen::most_pipes(descriptors, workers), workers);
    let congestion = Congestion::of_this_system();
    let bound = match listen::bind(&config.listen, &congestion, config.user_timeout()) {
        Ok(bound) => bound,
        Err(error) => return failed(EXIT_FAILED, error.code, Some(&error.errno), &error.message),
    };
    // Before listening, and making connections to itself, is given up.
    let kernel_tls = if config.mode == Mode::Tls { KernelTls::try_here() } else { Ok(KernelTls::default()) };
    let ciphers = Ciphers {
        handshake_only: config.mode == Mode::Auth,
        ..ktls::ciphers(&kernel_tls, config.records_per_key)
    };
    let identity = match Identity::generate(ciphers) {
        Ok(identity) => identity,
        Err(error) => return failed(EXIT_FAILED, "io", None, &format!("key pair: {error}")),
    };
    let relay_id = config.relay_id;
    let path = dir.socket(&relay_id);
    let control = match control::bind(&path) {
        Ok(control) => control,
        Err(error) => {
            return failed(EXIT_FAILED, "io", Some(&errno::of(&error)), &format!("control socket: {error}"));
        }
    };
    // Only the one that this process has bound: another relay of the same id keeps its own.
    let _socket = RemovedAtEnd(path);
    let null = detached.then(|| std::fs::OpenOptions::new().write(true).open("/dev/null"));
    // From here on nothing is opened, started or bound but what streams need.
    let confinement = confine::confine(Path::new("."), detached);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return failed(EXIT_FAILED, "io", Some(&errno::of(&error)), &format!("runtime: {error}"));
        }
    };
    let outcome = runtime.block_on(async {
        let control = tokio::net::UnixListener::from_std(control)
            .map_err(|error| (errno::of(&error), format!("control socket: {error}")))?;
        let mut sockets = Vec::new();
        let mut listeners = Vec::new();
        for (listener, socket) in bound {
            let socket =
                TcpListener::watched(socket).map_err(|error| (errno::of(&error), error.to_string()))?;
            listeners.push(listener.clone());
            sockets.push((listener, socket));
        }
        timer::start(Clock::new().map_err(|error| (errno::of(&error), format!("timer: {error}")))?);
        let workers =
            Arc::new(Workers::start(workers).map_err(|error| (errno::of(&error), error.to_string()))?);
        say(
            "ready",
            json!({
                "relay_id": relay_id,
                "pid": std::process::id(),
                "public_key": identity.public,
                "listeners": listeners
                    .iter()
                    .map(|listener| json!({"index": listener.index, "address": listener.address}))
                    .collect::<Vec<_>>(),
            }),
        );
        // The launcher has read the ready line; nobody reads what comes after it.
        if let Some(Ok(null)) = &null {
            let _ = rustix::stdio::dup2_stderr(null);
        }
        let relay =
            Relay::new(config, identity, events.clone(), listeners, confinement, kernel_tls, congestion)
                .map_err(|error| (String::new(), format!("TLS: {error}")))?;
        let half_open = Arc::new(listen::HalfOpen::new(descriptors));
        Ok(serve(Arc::new(relay), workers, half_open, sockets, control).await)
    });
    match outcome {
        Ok(end) => ExitCode::from(match end {
            End { cut: true, .. } => EXIT_CUT,
            End { reason, .. } if reason.state() == State::Failed => EXIT_FAILED,
            _ => 0,
        }),
        Err((errno, message)) => failed(EXIT_FAILED, "io", Some(&errno), &message),
    }
}

/// Whether the descriptors that a relay with so many workers may come to need are there.
fn fits(config: &Config, workers: usize) -> bool {
    let (needed, limit) = listen::descriptors(config, workers);
    limit.is_none_or(|limit| needed <= limit)
}

/// As many as there are cores where the work is our own, encryption. Where the kernel carries, half of them, since it needs the
/// others for what it does on its own account, and more threads than that cost wake-ups.
fn usual_workers(mode: Mode) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match mode {
        Mode::Tls => cores.min(MOST_WORKERS_OF_TLS),
        Mode::None | Mode::Auth => (cores / 2).clamp(1, MOST_WORKERS),
    }
}

/// A file that goes with its process.
struct RemovedAtEnd(PathBuf);

impl Drop for RemovedAtEnd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Everything between ready and the end record.
async fn serve(
    relay: Arc<Relay>,
    workers: Arc<Workers>,
    half_open: Arc<listen::HalfOpen>,
    sockets: Vec<(Arc<relay::Listener>, TcpListener)>,
    control: tokio::net::UnixListener,
) -> End {
    let control = tokio::spawn(control::serve(relay.clone(), control));
    let accepting: Vec<_> = sockets
        .into_iter()
        .map(|(listener, socket)| {
            tokio::spawn(listen::serve(relay.clone(), workers.clone(), half_open.clone(), listener, socket))
        })
        .collect();
    let probing = match relay.config.role {
        Role::Cons => tokio::spawn(cons::probe(relay.clone())),
        Role::Prod => tokio::spawn(prod::prove_targets(relay.clone())),
    };
    let signals = tokio::spawn(obey_signals(relay.clone()));

    let end = supervise::supervise(&relay).await;

    for task in accepting {
        let _ = task.await;
    }
    probing.abort();
    close_all(&relay).await;
    relay.say_refusals();
    relay.consider(std::time::Instant::now());
    let record = relay.end_record(&end);
    relay.record.send_replace(Some(relay.events.end(record)));
    let _ = control.await;
    signals.abort();
    end
}

/// Resets what is still open and waits until its bytes are counted.
async fn close_all(relay: &Relay) {
    relay.drop_kept();
    for connection in relay.connections() {
        connection.cut("ended");
    }
    let closed = async {
        while !relay.connections().is_empty() {
            timer::sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = timer::timeout(CLOSING, closed).await;
}

/// SIGTERM and SIGINT drain; the second one ends. SIGHUP is nobody's word here.
async fn obey_signals(relay: Arc<Relay>) {
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()))
    else {
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => continue,
        }
        if relay.is_draining() {
            relay.end(Reason::Admin, Some("ended by a second signal".into()), true);
        } else {
            relay.drain(Duration::from_secs_f64(relay.config.drain_s), Reason::Admin);
        }
    }
}

/// The soft limit is a default for programs that do not count; we need the hard one.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn read_stdin() -> Vec<u8> {
    let mut text = Vec::new();
    // An unreadable stdin is an empty document, which is refused by name.
    let _ = std::io::stdin().lock().take(LONGEST_CONFIGURATION_BYTES).read_to_end(&mut text);
    text
}

#[derive(Default)]
struct Arguments {
    command: String,
    relay_id: Option<RelayId>,
    runtime_dir: Option<PathBuf>,
    detached: bool,
    json: bool,
    lease_s: f64,
    deadline_s: f64,
    reason: String,
}

impl Arguments {
    fn parse() -> Result<Arguments, String> {
        use lexopt::prelude::*;
        let mut arguments = Arguments { deadline_s: 30.0, reason: "released".into(), ..Arguments::default() };
        let mut lease = false;
        let mut parser = lexopt::Parser::from_env();
        let said = |error: lexopt::Error| error.to_string();
        while let Some(argument) = parser.next().map_err(said)? {
            match argument {
                Value(value) if arguments.command.is_empty() => {
                    arguments.command = value.string().map_err(said)?;
                }
                Value(value) if arguments.relay_id.is_none() && takes_relay(&arguments.command) => {
                    arguments.relay_id = Some(value.string().map_err(said)?.parse()?);
                }
                Long("runtime-dir") => arguments.runtime_dir = Some(parser.value().map_err(said)?.into()),
                Long("detached") if arguments.command == "run" => arguments.detached = true,
                Long("lease-s") if arguments.command == "renew" => {
                    arguments.lease_s = parser.value().and_then(|value| value.parse()).map_err(said)?;
                    lease = true;
                }
                Long("deadline-s") if arguments.command == "drain" => {
                    arguments.deadline_s = parser.value().and_then(|value| value.parse()).map_err(said)?;
                }
                Long("reason") if arguments.command == "stop" => {
                    arguments.reason = parser.value().and_then(|value| value.string()).map_err(said)?;
                    if !["released", "admin"].contains(&arguments.reason.as_str()) {
                        return Err(format!("--reason {}: released or admin", arguments.reason));
                    }
                }
                Long("format") if arguments.command == "version" => {
                    let format = parser.value().and_then(|value| value.string()).map_err(said)?;
                    if format != "json" {
                        return Err(format!("--format {format}: only json is known"));
                    }
                    arguments.json = true;
                }
                Long("version") | Short('V') if arguments.command.is_empty() => {
                    arguments.command = "version".into()
                }
                Long("help") | Short('h') => arguments.command = "help".into(),
                other => return Err(other.unexpected().to_string()),
            }
        }
        match arguments.command.as_str() {
            "" => Err("no command was given".into()),
            "start" | "run" | "list" | "inspect" | "version" | "help" => Ok(arguments),
            "renew" if !lease => Err("renew needs --lease-s".into()),
            command if takes_relay(command) && arguments.relay_id.is_some() => Ok(arguments),
            command if takes_relay(command) => Err(format!("{command} needs a RELAY_ID")),
            command => Err(format!("unknown command '{command}'")),
        }
    }
}

fn takes_relay(command: &str) -> bool {
    ["status", "update", "renew", "drain", "stop", "forget"].contains(&command)
}
