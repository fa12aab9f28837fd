//! The one document that a relay is started with, and the changes it accepts later. Unknown keys are refused.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::key::PublicKey;

/// Fewer are not counted exactly enough.
const LEAST_RECORDS_PER_KEY: u64 = 1024;

/// Version of every document and of the WAN preamble.
pub const PROTOCOL: u32 = 1;

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Role {
    /// Inbound: listens on the WAN, connects to the application that listens.
    #[serde(rename = "PROD")]
    Prod,
    /// Outbound: listens on the LAN, dials the PROD relay.
    #[serde(rename = "CONS")]
    Cons,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Tls,
    Auth,
    None,
}

impl Mode {
    /// The WAN peer's key is proven before anything else happens.
    pub fn proves_keys(self) -> bool {
        self != Mode::None
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    Target,
    Path,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Until {
    Closed,
    Released,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    address: Option<IpAddr>,
    addresses: Option<Vec<IpAddr>>,
    pub first_port: u16,
    pub last_port: u16,
    pub indices: Vec<u16>,
}

impl Listen {
    /// Where each listener listens: one address, or one of each IP version.
    pub fn addresses(&self) -> &[IpAddr] {
        self.addresses.as_deref().unwrap_or(self.address.as_slice())
    }

    fn check(&self) -> Result<(), String> {
        if self.address.is_some() == self.addresses.is_some() {
            return Err("listen: exactly one of address and addresses must be given".into());
        }
        match self.addresses() {
            [_] => {}
            [first, second] if first.is_ipv4() != second.is_ipv4() => {}
            others => {
                let listed = others.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
                return Err(format!(
                    "listen.addresses: [{listed}], one address or one of each IP version is allowed"
                ));
            }
        }
        if !(1..=256).contains(&self.indices.len()) {
            return Err(format!("listen.indices: {} entries, 1 to 256 are allowed", self.indices.len()));
        }
        if self.indices.iter().collect::<BTreeSet<_>>().len() != self.indices.len() {
            return Err("listen.indices: an index stands twice".into());
        }
        if self.first_port > self.last_port || (self.first_port == 0) != (self.last_port == 0) {
            return Err(format!(
                "listen: ports {}..{}: first_port <= last_port, or both 0 to let the kernel choose",
                self.first_port, self.last_port
            ));
        }
        Ok(())
    }
}

/// The far relay. PROD gets key and sources of the CONS relays it admits; CONS gets key, id and listeners of the PROD relays
/// it dials.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    pub public_key: PublicKey,
    #[serde(default)]
    pub source_addresses: Vec<Network>,
    #[serde(default)]
    pub relay_id: Option<RelayId>,
    #[serde(default)]
    pub listeners: Vec<PeerListener>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerListener {
    pub index: u16,
    pub address: SocketAddr,
}

/// A CIDR network; a bare address is the network of that one address.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Network(IpNet);

impl Network {
    /// An IPv4 peer that reached a dual-stack socket counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map(Network).map_err(
            |_| serde::de::Error::custom(format!("'{text}' is neither an IP address nor a CIDR network")),
        )
    }
}

/// 16 random bytes, written as 32 lower-case hex digits. Names the relay's files, and the preamble carries it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RelayId(pub [u8; 16]);

impl std::str::FromStr for RelayId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not a relay_id: 32 lower-case hex digits");
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(wrong());
        }
        let mut id = [0; 16];
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| wrong())?;
        }
        Ok(RelayId(id))
    }
}

impl std::fmt::Display for RelayId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for RelayId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RelayId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Checked before everything else, see `parse`.
    #[serde(rename = "protocol")]
    _protocol: u32,
    pub relay_id: RelayId,
    pub role: Role,
    pub mode: Mode,
    pub listen: Listen,
    #[serde(default)]
    pub sources: Vec<Network>,
    #[serde(default)]
    pub targets: Vec<SocketAddr>,
    #[serde(default)]
    pub peers: Vec<Peer>,
    #[serde(default)]
    pub onward_source: Option<IpAddr>,
    #[serde(default = "default_probe")]
    pub probe: Probe,
    #[serde(default = "default_until")]
    pub until: Until,
    #[serde(default = "default_max_connections")]
    pub max_connections: u32,
    /// Of a cipher that needs a new key after so many records, how many at most; 0 is the cipher's own limit.
    #[serde(default)]
    pub records_per_key: u64,
    #[serde(default)]
    pub rate_mbits_per_s: u64,
    /// Threads that carry connections; 0 lets the relay choose.
    #[serde(default)]
    pub workers: usize,
    pub lease_s: f64,
    pub lifetime_s: f64,
    #[serde(default = "default_hello_timeout_s")]
    pub hello_timeout_s: f64,
    #[serde(default = "default_linger_s")]
    pub linger_s: f64,
    #[serde(default = "default_connect_timeout_s")]
    pub connect_timeout_s: f64,
    #[serde(default = "default_handshake_timeout_s")]
    pub handshake_timeout_s: f64,
    #[serde(default)]
    pub idle_s: f64,
    /// Like `idle_s`, for a connection of which one direction has ended.
    #[serde(default)]
    pub half_closed_s: f64,
    #[serde(default = "default_drain_s")]
    pub drain_s: f64,
    #[serde(default = "default_user_timeout_s")]
    pub user_timeout_s: f64,
}

fn default_probe() -> Probe {
    Probe::Target
}
fn default_until() -> Until {
    Until::Released
}
fn default_max_connections() -> u32 {
    64
}
fn default_hello_timeout_s() -> f64 {
    180.0
}
fn default_linger_s() -> f64 {
    5.0
}
fn default_connect_timeout_s() -> f64 {
    10.0
}
fn default_handshake_timeout_s() -> f64 {
    5.0
}
fn default_drain_s() -> f64 {
    30.0
}
fn default_user_timeout_s() -> f64 {
    60.0
}

/// What `update` may change; each field that is present replaces the whole value.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Changes {
    /// As in every document; here it may be left out.
    pub protocol: Option<u32>,
    pub targets: Option<Vec<SocketAddr>>,
    pub peers: Option<Vec<Peer>>,
    pub sources: Option<Vec<Network>>,
    pub lease_s: Option<f64>,
    pub rate_mbits_per_s: Option<u64>,
}

/// A lease, lifetime or time-out in seconds: ten years is far beyond any policy and keeps `Instant` arithmetic from overflow.
const LONGEST_S: f64 = 315_360_000.0;
/// 100 Tbit/s: no network card, and far from the end of 64 bits.
const FASTEST_MBITS_PER_S: u64 = 100_000_000;
const MOST_ENTRIES: usize = 4096;

impl Config {
    pub fn user_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs_f64(self.user_timeout_s)
    }

    /// Parses and checks one document. The message names the field and what is allowed.
    pub fn parse(text: &[u8]) -> Result<Config, String> {
        // The protocol first: a document of another version may have other fields, and that is the mistake to report.
        #[derive(Deserialize)]
        struct Versioned {
            protocol: u32,
        }
        let versioned: Versioned =
            serde_json::from_slice(text).map_err(|error| format!("configuration: {error}"))?;
        if versioned.protocol != PROTOCOL {
            return Err(format!(
                "configuration: protocol {} was asked, this s2ds speaks protocol {PROTOCOL}",
                versioned.protocol
            ));
        }
        let config: Config =
            serde_json::from_slice(text).map_err(|error| format!("configuration: {error}"))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        self.listen.check()?;
        if (1..LEAST_RECORDS_PER_KEY).contains(&self.records_per_key) {
            return Err(format!(
                "records_per_key: {}, 0 or at least {LEAST_RECORDS_PER_KEY} is allowed",
                self.records_per_key
            ));
        }
        if !(1..=65536).contains(&self.max_connections) {
            return Err(format!("max_connections: {}, 1 to 65536 is allowed", self.max_connections));
        }
        check_rate(self.rate_mbits_per_s)?;
        if self.workers > 64 {
            return Err(format!("workers: {}, 0 to 64 is allowed", self.workers));
        }
        for (name, value, least) in [
            ("lease_s", self.lease_s, 0.1),
            ("lifetime_s", self.lifetime_s, 0.1),
            ("hello_timeout_s", self.hello_timeout_s, 0.1),
            ("linger_s", self.linger_s, 0.0),
            ("connect_timeout_s", self.connect_timeout_s, 0.1),
            ("handshake_timeout_s", self.handshake_timeout_s, 0.1),
            ("idle_s", self.idle_s, 0.0),
            ("half_closed_s", self.half_closed_s, 0.0),
            ("drain_s", self.drain_s, 0.0),
            ("user_timeout_s", self.user_timeout_s, 0.1),
        ] {
            check_seconds(name, value, least)?;
        }
        if let Some(source) = self.onward_source {
            if let Some(target) = self.targets.iter().find(|target| target.is_ipv4() != source.is_ipv4()) {
                return Err(format!(
                    "onward_source {source} and target {target} are of different IP versions"
                ));
            }
        }
        check_targets(self.role, &self.targets)?;
        check_peers(self.role, self.mode, &self.peers)?;
        check_length("sources", self.sources.len())
    }
}

impl Changes {
    /// Parses and checks the changes for a relay of this configuration.
    pub fn check(&self, config: &Config) -> Result<(), String> {
        if let Some(protocol) = self.protocol.filter(|protocol| *protocol != PROTOCOL) {
            return Err(format!(
                "changes: protocol {protocol} was asked, this s2ds speaks protocol {PROTOCOL}"
            ));
        }
        if let Some(targets) = &self.targets {
            check_targets(config.role, targets)?;
        }
        if let Some(peers) = &self.peers {
            check_peers(config.role, config.mode, peers)?;
        }
        if let Some(sources) = &self.sources {
            check_length("sources", sources.len())?;
        }
        if let Some(rate) = self.rate_mbits_per_s {
            check_rate(rate)?;
        }
        if let Some(lease_s) = self.lease_s {
            check_seconds("lease_s", lease_s, 0.1)?;
        }
        Ok(())
    }
}

/// `name` is a finite number of seconds from `least` to ten years.
pub fn check_seconds(name: &str, value: f64, least: f64) -> Result<(), String> {
    if (least..=LONGEST_S).contains(&value) {
        Ok(())
    } else {
        Err(format!("{name}: {value}, {least} to {LONGEST_S} is allowed"))
    }
}

fn check_rate(rate_mbits_per_s: u64) -> Result<(), String> {
    if rate_mbits_per_s <= FASTEST_MBITS_PER_S {
        Ok(())
    } else {
        Err(format!(
            "rate_mbits_per_s: {rate_mbits_per_s}, 0 (unlimited) to {FASTEST_MBITS_PER_S} is allowed"
        ))
    }
}

fn check_length(name: &str, length: usize) -> Result<(), String> {
    if length <= MOST_ENTRIES {
        Ok(())
    } else {
        Err(format!("{name}: {length} entries, at most {MOST_ENTRIES}"))
    }
}

fn check_targets(role: Role, targets: &[SocketAddr]) -> Result<(), String> {
    if role == Role::Cons && !targets.is_empty() {
        return Err("targets: only a PROD relay connects to targets".into());
    }
    if let Some(target) = targets.iter().find(|target| target.port() == 0 || target.ip().is_unspecified()) {
        return Err(format!("targets: {target} is no address to connect to"));
    }
    check_length("targets", targets.len())
}

fn check_peers(role: Role, mode: Mode, peers: &[Peer]) -> Result<(), String> {
    check_length("peers", peers.len())?;
    for peer in peers {
        match role {
            Role::Prod if mode == Mode::None && peer.source_addresses.is_empty() => {
                return Err(
                    "peers: in mode none a peer is known only by source_addresses, which must not be empty"
                        .into(),
                );
            }
            Role::Cons if peer.relay_id.is_none() || peer.listeners.is_empty() => {
                return Err("peers: a CONS relay needs relay_id and listeners of each PROD relay".into());
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> serde_json::Value {
        serde_json::json!({
            "protocol": 1, "relay_id": "0123456789abcdef0123456789abcdef", "role": "PROD", "mode": "tls",
            "listen": {"address": "127.0.0.1", "first_port": 0, "last_port": 0, "indices": [0]},
            "lease_s": 60, "lifetime_s": 3600
        })
    }

    fn refusal(change: impl Fn(&mut serde_json::Value)) -> String {
        let mut document = document();
        change(&mut document);
        Config::parse(document.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn the_smallest_document_is_accepted() {
        assert_eq!(Config::parse(document().to_string().as_bytes()).unwrap().max_connections, 64);
    }

    #[test]
    fn each_mistake_is_named() {
        for (field, value, said) in [
            ("protocol", serde_json::json!(2), "protocol 2 was asked, this s2ds speaks protocol 1"),
            ("colour", serde_json::json!("red"), "unknown field `colour`"),
            ("relay_id", serde_json::json!("../../etc/passwd"), "32 lower-case hex digits"),
            ("mode", serde_json::json!("ssl"), "unknown variant `ssl`"),
            ("lease_s", serde_json::json!(0), "lease_s: 0"),
            ("lease_s", serde_json::json!(1e300), "lease_s"),
            ("targets", serde_json::json!(["example.org:80"]), "invalid socket address"),
            ("targets", serde_json::json!(["0.0.0.0:80"]), "no address to connect to"),
            ("sources", serde_json::json!(["10.0.0.0/33"]), "neither an IP address nor a CIDR network"),
            ("max_connections", serde_json::json!(0), "1 to 65536"),
            ("records_per_key", serde_json::json!(1023), "0 or at least 1024"),
        ] {
            let message = refusal(|document| document[field] = value.clone());
            assert!(message.contains(said), "{field}: {message}");
        }
    }

    #[test]
    fn a_listener_has_one_address_or_one_of_each_ip_version() {
        let listening = |addresses: serde_json::Value| {
            let mut document = document();
            document["listen"]["address"] = serde_json::Value::Null;
            document["listen"]["addresses"] = addresses;
            Config::parse(document.to_string().as_bytes()).map(|config| config.listen.addresses().len())
        };
        assert_eq!(listening(serde_json::json!(["127.0.0.1"])), Ok(1));
        assert_eq!(listening(serde_json::json!(["::1", "127.0.0.1"])), Ok(2));
        for wrong in [
            serde_json::json!([]),
            serde_json::json!(["127.0.0.1", "127.0.0.2"]),
            serde_json::json!(["::1", "127.0.0.1", "::2"]),
        ] {
            assert!(listening(wrong).unwrap_err().contains("one of each IP version"));
        }
        assert!(listening(serde_json::Value::Null).unwrap_err().contains("exactly one of"));
        let message = refusal(|document| document["listen"]["addresses"] = serde_json::json!(["::1"]));
        assert!(message.contains("exactly one of address and addresses"), "{message}");
    }

    #[test]
    fn mode_none_needs_the_sources_of_a_peer() {
        let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        let message = refusal(|document| {
            document["mode"] = "none".into();
            document["peers"] = serde_json::json!([{"public_key": key, "source_addresses": []}]);
        });
        assert!(message.contains("must not be empty"), "{message}");
    }

    #[test]
    fn an_ipv4_peer_on_a_dual_stack_socket_is_matched_as_ipv4() {
        let network: Network = serde_json::from_str("\"10.0.0.0/8\"").unwrap();
        assert!(network.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!network.contains("11.0.0.1".parse().unwrap()));
    }
}
