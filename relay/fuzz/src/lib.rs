//! What strangers and users say to a relay, as bytes that a fuzzer chooses. Each function takes them as the relay does, and
//! asserts what must hold for any; a panic in the relay's own code is a find as well.

use std::sync::{Arc, LazyLock, RwLock};

use rustls::{ClientConfig, ServerConfig};

use s2ds::config::Config;
use s2ds::key::{Ciphers, Identity};
use s2ds::preamble::{ANSWER_BYTES, Answer, REQUEST_BYTES, Request};
use s2ds::record::{ALERT_BYTES, Content, OVERHEAD_BYTES, Records, length_of_first};
use s2ds::tls::{HEADER_BYTES, Session};

/// With `PLANTED` in the environment there is a fault to be found, so that it can be seen that finding works.
static PLANTED: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PLANTED").is_some());

/// The first message on a WAN connection, and the answer to it: what is read is what was written, byte by byte.
pub fn preamble(data: &[u8]) {
    if let Some(message) = data.first_chunk::<REQUEST_BYTES>()
        && let Ok(request) = Request::decode(message)
    {
        assert!(!*PLANTED || request.listener & 0xff != 0x5e, "planted");
        assert_eq!(&request.encode(), message);
    }
    if let Some(message) = data.first_chunk::<ANSWER_BYTES>()
        && let Some(answer) = Answer::decode(message)
    {
        assert_eq!(&answer.encode(), message);
    }
}

/// A request at the control socket.
pub fn control(data: &[u8]) {
    static CONFIG: LazyLock<Config> = LazyLock::new(|| {
        Config::parse(
            br#"{"protocol": 1, "relay_id": "00000000000000000000000000000001", "role": "PROD", "mode": "tls",
                "listen": {"address": "127.0.0.1", "first_port": 0, "last_port": 0, "indices": [0]},
                "lease_s": 60, "lifetime_s": 600, "hello_timeout_s": 60}"#,
        )
        .expect("it is the one of the documentation")
    });
    if let Ok(line) = std::str::from_utf8(data)
        && let Err(refusal) = s2ds::control::parse(line, &CONFIG)
    {
        assert!(refusal["error"]["code"].is_string() && refusal["error"]["message"].is_string());
    }
}

/// The document that a relay is started with.
pub fn configuration(data: &[u8]) {
    if let Err(message) = Config::parse(data) {
        assert!(!message.is_empty());
    }
}

/// Two relays that know each other.
static CONFIGS: LazyLock<(Arc<ServerConfig>, Arc<ClientConfig>)> = LazyLock::new(|| {
    let identity = || Identity::generate(Ciphers::default()).expect("a key");
    let (prod, cons) = (identity(), identity());
    let admitted = Arc::new(RwLock::new(vec![cons.public]));
    (prod.server(admitted).expect("a server"), cons.client(prod.public).expect("a client"))
});

fn parties() -> (Party, Party) {
    let server = Session::server(CONFIGS.0.clone()).expect("a session");
    let client = Session::client(CONFIGS.1.clone()).expect("a session");
    (Party::new(server), Party::new(client))
}

/// What a peer that has proven its key puts into its records: none of it is believed, and data arrives as it was said. The
/// first byte says which peer, and whether its words are sealed.
pub fn records(data: &[u8]) {
    let Some((how, mut said)) = data.split_first() else { return };
    let (mut server, mut client) = parties();
    client.hears(Vec::new(), 0);
    for _ in 0..2 {
        server.hears(client.says(), 0);
        client.hears(server.says(), 0);
    }
    let [mut server, mut client] = [server, client].map(|party| Records::of(party.session).expect("keys"));
    let (from, to) = if how & 1 == 0 { (&mut client, &mut server) } else { (&mut server, &mut client) };
    if how & 2 != 0 {
        let mut bytes = said.to_vec();
        while let Ok(Some(length)) = length_of_first(&bytes)
            && length <= bytes.len()
        {
            assert!(to.open(&mut bytes[..length]).is_err(), "nobody but the peer has the key");
            bytes.drain(..length);
        }
        return;
    }
    while let Some(([content_type, high, low], rest)) = said.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (content, rest) = rest.split_at(rest.len().min(length));
        let mut record = vec![0; length + OVERHEAD_BYTES];
        record[HEADER_BYTES..][..content.len()].copy_from_slice(content);
        if from.seal(*content_type, &mut record).is_err() || length_of_first(&record).is_err() {
            return;
        }
        match to.open(&mut record) {
            Ok(Content::Data(opened)) => assert_eq!(
                &record[HEADER_BYTES..][..opened.min(content.len())],
                &content[..opened.min(content.len())]
            ),
            Ok(Content::Nothing) => {}
            Ok(Content::CloseNotify) => return,
            Err(fault) => {
                let alert = fault.alert.map(|alert| to.seal_alert(alert).expect("an alert"));
                assert!(alert.is_none_or(|alert| alert.len() == ALERT_BYTES));
                return;
            }
        }
        said = rest;
    }
}

/// Two relays that shake hands, with somebody between them who changes what he likes; the first byte says what.
pub fn handshake(data: &[u8]) {
    let Some((how, mut edits)) = data.split_first() else { return };
    let (mut server, mut client) = parties();
    if how & 1 != 0 {
        // nothing but what the fuzzer says
        server.hears(edits.to_vec(), usize::from(how >> 4));
        client.hears(edits.to_vec(), usize::from(how >> 4));
        return;
    }
    client.hears(Vec::new(), 0);
    for _ in 0..4 {
        server.hears(changed(client.says(), &mut edits), usize::from(how >> 4));
        client.hears(changed(server.says(), &mut edits), usize::from(how >> 4));
    }
    for party in [&mut client, &mut server] {
        if party.session.peer_key().is_some() && !party.failed {
            let _ = party.session.send(b"through").and_then(|()| party.session.send_close_notify());
        }
    }
    server.hears(changed(client.says(), &mut edits), usize::from(how >> 4));
    client.hears(changed(server.says(), &mut edits), usize::from(how >> 4));
}

/// More than both sides ever say; without an end, saying it twice over and over would fill the memory.
const LONGEST_SAID_BYTES: usize = 64 << 10;

struct Party {
    session: Session,
    unread: Vec<u8>,
    failed: bool,
}

impl Party {
    fn new(session: Session) -> Party {
        Party { session, unread: Vec::new(), failed: false }
    }

    fn says(&mut self) -> Vec<u8> {
        let said = self.session.outgoing.pending().to_vec();
        self.session.outgoing.sent(said.len());
        said
    }

    /// Takes bytes in `pieces` at a time, 0 is all at once. After an error nobody listens any more, as in the relay.
    fn hears(&mut self, bytes: Vec<u8>, pieces: usize) {
        let length = if pieces == 0 { bytes.len() } else { bytes.len() / pieces + 1 };
        let chunks: Vec<&[u8]> = if bytes.is_empty() { vec![&[]] } else { bytes.chunks(length).collect() };
        for chunk in chunks {
            if self.failed {
                return;
            }
            self.unread.extend_from_slice(chunk);
            match self.session.receive(&mut self.unread) {
                Ok(done) => {
                    assert!(done <= self.unread.len());
                    self.unread.drain(..done);
                }
                Err(_) => self.failed = true,
            }
            assert!(self.session.plain.len() <= 1 << 16, "more plaintext than anybody said");
        }
    }
}

/// What arrives of `said`: each edit is where (2 bytes), what (1) and a value (1).
fn changed(mut said: Vec<u8>, edits: &mut &[u8]) -> Vec<u8> {
    while let Some(edit) = edits.first_chunk::<4>() {
        *edits = &edits[4..];
        if said.is_empty() {
            break;
        }
        let at = usize::from(u16::from_be_bytes([edit[0], edit[1]])) % said.len();
        match edit[2] % 6 {
            0 => said[at] = edit[3],
            1 => said[at] ^= 1 << (edit[3] % 8),
            2 => said.truncate(at),
            3 => said.insert(at, edit[3]),
            4 if said.len() < LONGEST_SAID_BYTES => {
                let again = said[at..].to_vec();
                said.extend(again);
            }
            _ => break, // the rest of the edits is for what comes later
        }
    }
    said
}
