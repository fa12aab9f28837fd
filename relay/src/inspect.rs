//! `s2ds inspect`: the facts about this node that decide how relays run on it. What they mean is judged elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::ifaddrs::getifaddrs;
use rustix::fs::StatVfsMountFlags;
use rustix::process::{Resource, getrlimit};
use serde::Deserialize;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::client::Refusal;
use crate::config::PROTOCOL;
use crate::errno;
use crate::ktls::KernelTls;
use crate::pipe::PIPE_BYTES;

/// Of a wider range of ports so many are tried, evenly spread.
const MOST_PORTS: usize = 4096;
const MOST_NAMED: usize = 8;
const MOST_ENTRIES: usize = 16;
/// How deep a bond over a VLAN over a card can be.
const MOST_LAYERS: usize = 4;

const SETTINGS: &[&str] = &[
    "fs/file-max",
    "fs/file-nr",
    "fs/nr_open",
    "fs/pipe-max-size",
    "fs/pipe-user-pages-hard",
    "fs/pipe-user-pages-soft",
    "net/core/default_qdisc",
    "net/core/rmem_max",
    "net/core/somaxconn",
    "net/core/wmem_max",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/tcp_available_congestion_control",
    "net/ipv4/tcp_congestion_control",
    "net/ipv4/tcp_mem",
    "net/ipv4/tcp_mtu_probing",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_slow_start_after_idle",
    "net/ipv4/tcp_timestamps",
    "net/ipv4/tcp_window_scaling",
    "net/ipv4/tcp_wmem",
];

const LOGIND_PLACES: &[&str] =
    &["/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    protocol: u32,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    #[serde(default)]
    first_port: u16,
    #[serde(default)]
    last_port: u16,
    #[serde(default)]
    directories: Vec<PathBuf>,
}

/// Looks at the node as the user who asks, and changes nothing: the runtime directory is not made, no port is kept.
pub fn inspect(request: &[u8], runtime_dir: &Path) -> Result<Value, Refusal> {
    let began = Instant::now();
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = parse(request)?;
    let uid = rustix::process::geteuid().as_raw();
    let user = user_name(uid);
    let system = rustix::system::uname();
    let directories = std::iter::once(runtime_dir).chain(request.directories.iter().map(PathBuf::as_path));
    let mut facts = json!({
        "protocol": PROTOCOL,
        "version": env!("CARGO_PKG_VERSION"),
        "host": system.nodename().to_string_lossy(),
        "uid": uid,
        "user": user,
        "kernel": system.release().to_string_lossy(),
        "architecture": system.machine().to_string_lossy(),
        "ktls": kernel_tls(),
        "pipe": try_pipe(),
        "page_bytes": rustix::param::page_size(),
        "own_addresses": own_addresses(),
        "addresses": request.addresses.iter().map(|&ip| address(ip, &request)).collect::<Vec<_>>(),
        "directories": directories.map(directory).collect::<Vec<_>>(),
        "descriptors": descriptors(),
        "settings": settings(),
        "logind": logind(user.as_deref()),
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "cpus_allowed": field_of("/proc/self/status", "Cpus_allowed_list:"),
        "numa_nodes": numa_nodes(),
        "memory_bytes": kib_of("MemTotal:"),
        "memory_available_bytes": kib_of("MemAvailable:"),
    });
    // The clock was read at the beginning; who asked can narrow down when by what came after.
    facts["at_ns"] = json!(u64::try_from(at.as_nanos()).unwrap_or(0));
    facts["took_s"] = json!(began.elapsed().as_secs_f64());
    Ok(facts)
}

fn parse(text: &[u8]) -> Result<Request, Refusal> {
    let wrong = |message: String| Refusal::new("bad-request", format!("inspect: {message}"));
    let request: Request = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
    if request.protocol != PROTOCOL {
        let asked = request.protocol;
        let message = format!("inspect: protocol {asked} was asked, this s2ds speaks protocol {PROTOCOL}");
        return Err(Refusal::new("protocol", message));
    }
    if request.addresses.len().max(request.directories.len()) > MOST_ENTRIES {
        return Err(wrong(format!("at most {MOST_ENTRIES} addresses and directories")));
    }
    if request.first_port > request.last_port || (request.first_port == 0) != (request.last_port == 0) {
        return Err(wrong(format!(
            "ports {}..{}: first_port <= last_port, or both 0",
            request.first_port, request.last_port
        )));
    }
    Ok(request)
}

// ---- what the kernel can ----

/// Whether a TCP connection of this user can be given to the kernel's TLS, and whether that takes new keys later; asked of a
/// real one, as no setting tells.
fn kernel_tls() -> Value {
    match KernelTls::try_here() {
        Ok(kernel) => json!({"available": true, "errno": null, "new_keys": kernel.new_keys}),
        Err(unable) => json!({"available": false, "errno": unable.errno(), "new_keys": null}),
    }
}

/// The size that a pipe of this user gets at this moment, all his other pipes considered.
fn try_pipe() -> Value {
    let granted = rustix::pipe::pipe().and_then(|(reader, _writer)| {
        // Refused, a pipe stays as it was made.
        let _ = rustix::pipe::fcntl_setpipe_size(&reader, PIPE_BYTES);
        rustix::pipe::fcntl_getpipe_size(&reader)
    });
    let errno = granted.err().map(|error| errno::name(error.raw_os_error()));
    json!({"asked_bytes": PIPE_BYTES, "granted_bytes": granted.ok(), "errno": errno})
}

fn descriptors() -> Value {
    let limit = getrlimit(Resource::Nofile);
    json!({"soft": limit.current, "hard": limit.maximum})
}

fn settings() -> Value {
    let known = SETTINGS
        .iter()
        .map(|name| (name.replace('/', "."), json!(text_of(&Path::new("/proc/sys").join(name)))));
    Value::Object(known.collect())
}

// ---- addresses ----

/// One address that listeners are to have: whether this node has it, on what, and which ports of the range are free.
fn address(ip: IpAddr, request: &Request) -> Value {
    let bound = try_bind(ip, 0);
    let interface = interface_of(ip);
    let ports = (bound.is_ok() && request.first_port > 0).then(|| ports(ip, request));
    json!({
        "address": ip,
        "errno": bound.err().map(|error| errno::of(&error)),
        "interface": interface.map(|name| about(&name)),
        "ports": ports,
    })
}

fn ports(ip: IpAddr, request: &Request) -> Value {
    let count = usize::from(request.last_port - request.first_port) + 1;
    let step = count.div_ceil(MOST_PORTS);
    let (mut checked, mut free, mut refused) = (0, 0, Vec::new());
    for port in (request.first_port..=request.last_port).step_by(step) {
        checked += 1;
        match try_bind(ip, port) {
            Ok(()) => free += 1,
            Err(error) if refused.len() < MOST_NAMED => {
                refused.push(json!({"port": port, "errno": errno::of(&error)}));
            }
            Err(_) => {}
        }
    }
    json!({"checked": checked, "free": free, "refused": refused})
}

/// Binds as a listener does, but never listens: nobody can connect, and a relay that starts meanwhile is not in the way.
fn try_bind(ip: IpAddr, port: u16) -> io::Result<()> {
    let address = SocketAddr::new(ip, port);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())
}

/// Every address of this node, with its interface.
fn interfaces() -> impl Iterator<Item = (IpAddr, String)> {
    getifaddrs().into_iter().flatten().filter_map(|found| {
        let address = found.address?;
        let four = address.as_sockaddr_in().map(|four| IpAddr::from(four.ip()));
        let six = address.as_sockaddr_in6().map(|six| IpAddr::from(six.ip()));
        Some((four.or(six)?, found.interface_name))
    })
}

fn interface_of(ip: IpAddr) -> Option<String> {
    interfaces().find_map(|(address, name)| (address == ip).then_some(name))
}

/// What could be bound instead of an address that this node does not have.
fn own_addresses() -> Vec<Value> {
    let routed = interfaces().filter(|(ip, _)| match ip {
        IpAddr::V4(four) => !four.is_loopback(),
        IpAddr::V6(six) => !six.is_loopback() && !six.is_unicast_link_local(),
    });
    routed.take(MOST_NAMED).map(|(ip, name)| json!({"address": ip, "interface": name})).collect()
}

fn about(interface: &str) -> Value {
    let path = Path::new("/sys/class/net").join(interface);
    let card = card_below(path.clone());
    let driver = fs::read_link(card.join("device/driver")).ok();
    json!({
        "name": interface,
        // A namespace of the network may have the /sys of another.
        "mtu": number_of(&path.join("mtu"))
            .or_else(|| number_of(&Path::new("/proc/sys/net/ipv6/conf").join(interface).join("mtu"))),
        "speed_mbits_per_s": number_of(&path.join("speed")).filter(|speed| *speed > 0),
        "driver": driver.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned())),
        "numa_node": number_of(&card.join("device/numa_node")).filter(|node| *node >= 0),
    })
}

/// A bond or a VLAN is made of another interface; the first one of it that is a card.
fn card_below(mut path: PathBuf) -> PathBuf {
    for _ in 0..MOST_LAYERS {
        let lower = fs::read_dir(&path).ok().and_then(|entries| {
            let mut paths = entries.flatten().map(|entry| entry.path());
            paths.find(|path| {
                path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"lower_"))
            })
        });
        match lower {
            Some(lower) => path = lower,
            None => break,
        }
    }
    path
}

// ---- directories ----

/// The file system of a directory, or of what is above it where it is still to be made.
fn directory(path: &Path) -> Value {
    let there = fs::metadata(path);
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let existing = existing.canonicalize().unwrap_or_else(|_| existing.into());
    let volume = rustix::fs::statvfs(&existing).ok();
    let has = |flag| volume.as_ref().map(|volume| volume.f_flag.contains(flag));
    json!({
        "path": path,
        "errno": there.as_ref().err().map(errno::of),
        "mode": there.as_ref().ok().map(|about| about.mode() & 0o7777),
        "uid": there.as_ref().ok().map(|about| about.uid()),
        "file_system": file_system_of(&existing),
        "free_bytes": volume.as_ref().map(|volume| volume.f_bavail.saturating_mul(volume.f_frsize)),
        "free_files": volume.as_ref().filter(|volume| volume.f_files > 0).map(|volume| volume.f_favail),
        "read_only": has(StatVfsMountFlags::RDONLY),
        "noexec": has(StatVfsMountFlags::NOEXEC),
    })
}

/// The type and the place of the mount that a path lies in; of two at one place the later one is on top.
fn file_system_of(path: &Path) -> Value {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut best = (0, Value::Null);
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(place) = before.split(' ').nth(4) else { continue };
        let place = PathBuf::from(place.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"));
        let depth = place.components().count();
        if path.starts_with(&place) && depth >= best.0 {
            best = (depth, json!({"type": after.split(' ').next(), "mounted_at": place}));
        }
    }
    best.1
}

// ---- the user and the machine ----

/// From /etc/passwd, else what the session says: a static binary has no other directory of names.
fn user_name(uid: u32) -> Option<String> {
    let known = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let listed = known.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    listed.or_else(|| std::env::var("USER").ok()).or_else(|| std::env::var("LOGNAME").ok())
}

/// Whether logind ends what a user leaves running at logout. A default is what the installed file has as a comment.
fn logind(user: Option<&str>) -> Value {
    let places = LOGIND_PLACES.iter().map(Path::new);
    let mut texts: Vec<String> = places
        .clone()
        .find_map(|place| fs::read_to_string(place.join("logind.conf")).ok())
        .into_iter()
        .collect();
    let mut parts = BTreeMap::new();
    for file in places.filter_map(|place| fs::read_dir(place.join("logind.conf.d")).ok()).flatten().flatten()
    {
        if file.path().extension().is_some_and(|extension| extension == "conf") {
            parts.entry(file.file_name()).or_insert_with(|| file.path());
        }
    }
    texts.extend(parts.values().filter_map(|path| fs::read_to_string(path).ok()));
    let setting = |key: &str| {
        let assigned = |line: &str| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        };
        let lines = || texts.iter().flat_map(|text| text.lines());
        lines()
            .filter_map(assigned)
            .next_back()
            .or_else(|| lines().find_map(|line| assigned(line.strip_prefix('#')?)))
    };
    json!({
        "running": Path::new("/run/systemd/sessions").exists(),
        "kill_user_processes": setting("KillUserProcesses"),
        "kill_only_users": setting("KillOnlyUsers"),
        "kill_exclude_users": setting("KillExcludeUsers"),
        "linger": user.is_some_and(|user| Path::new("/var/lib/systemd/linger").join(user).exists()),
    })
}

/// The processors of each NUMA node, as the kernel lists them.
fn numa_nodes() -> BTreeMap<u32, Option<String>> {
    let nodes = fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    nodes
        .filter_map(|node| {
            let number = node.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            Some((number, text_of(&node.path().join("cpulist"))))
        })
        .collect()
}

fn text_of(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn number_of(path: &Path) -> Option<i64> {
    text_of(path)?.parse().ok()
}

fn field_of(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
}

fn kib_of(name: &str) -> Option<u64> {
    let value = field_of("/proc/meminfo", name)?;
    value.strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}
