//! The hand-over of mode `auth` from TLS to clear text, with a peer that leaves no gap: the last records of TLS, close_notify
//! and 1 MiB of clear text leave in one write. A relay that took one byte too many out of the kernel would lose it.
//!
//! Driven by tests/relay/test_handover.py; S2DS names the relay, HANDOVERS how often.

mod harness;
#[path = "../src/hkdf.rs"]
mod hkdf;
#[path = "../src/key.rs"]
#[allow(dead_code)]
mod key;

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;

use harness::*;
use key::{Ciphers, Identity};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};
use serde_json::json;

fn times() -> usize {
    std::env::var("HANDOVERS").map_or(100, |text| text.parse().unwrap())
}

/// The test is CONS: its Finished, the request, close_notify and 1 MiB are one train.
#[test]
#[ignore = "needs the relay: tests/relay/test_handover.py runs it"]
fn nothing_is_lost_on_the_way_to_the_producer() {
    to_the_producer("prod", None, times());
}

/// The same peer says its part of the handshake in records of a few bytes: its messages lie in several of them, and the
/// relay must neither lose one nor take two.
#[test]
#[ignore = "needs the relay: tests/relay/test_handover.py runs it"]
fn nothing_is_lost_after_a_handshake_in_fragments() {
    to_the_producer("fragments", Some(50), times() / 10);
}

fn to_the_producer(name: &str, fragment_bytes: Option<usize>, times: usize) {
    let identity = Identity::generate(Ciphers::default()).unwrap();
    let producer = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::start(
        name,
        json!({
            "role": "PROD", "mode": "auth", "targets": [producer.local_addr().unwrap().to_string()],
            "peers": [{"public_key": identity.public, "source_addresses": ["127.0.0.1"]}]
        }),
    );
    let mut config = (*identity.client(relay.public_key()).unwrap()).clone();
    config.max_fragment_size = fragment_bytes;
    let config = Arc::new(config);
    let mut request = [0; 64];
    request[..8].copy_from_slice(&[b'S', b'2', b'D', b'S', 1, 1, 2, 0]);
    request[8..24].copy_from_slice(&relay_id());
    for number in 0..times {
        let mut stream = prepared(TcpStream::connect(relay.address()).unwrap());
        let name = ServerName::try_from("s2ds.invalid").unwrap();
        let mut session = Connection::Client(ClientConnection::new(config.clone(), name).unwrap());
        shake_hands(&mut stream, &mut session);
        session.writer().write_all(&request).unwrap();
        session.send_close_notify();
        let mut train = pending(&mut session);
        train.extend(payload(number));
        let mut writing = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writing.write_all(&train).unwrap();
            writing.shutdown(Shutdown::Write).unwrap();
        });
        let application = exchange(producer.accept().unwrap().0, payload(number + 7), payload(number));
        let mut answer = [0; 32];
        read_plain(&mut stream, &mut session, &mut answer);
        assert_eq!(answer[..6], *b"S2DR\x01\x00");
        read_close_notify(&mut stream, &mut session);
        assert_arrives(&mut stream, &payload(number + 7));
        sender.join().unwrap();
        application.join().unwrap();
    }
}

/// The test is PROD: its answer, close_notify and 1 MiB are one train.
#[test]
#[ignore = "needs the relay: tests/relay/test_handover.py runs it"]
fn nothing_is_lost_on_the_way_to_the_consumer() {
    let identity = Identity::generate(Ciphers::default()).unwrap();
    let wan = TcpListener::bind("127.0.0.1:0").unwrap();
    let listeners = json!([{"index": 0, "address": wan.local_addr().unwrap().to_string()}]);
    let relay = Relay::start(
        "cons",
        json!({
            "role": "CONS", "mode": "auth", "probe": "path",
            "peers": [{"relay_id": RELAY_ID.replace('0', "f"), "public_key": identity.public, "listeners": listeners}]
        }),
    );
    let config = identity.server(Arc::new(RwLock::new(vec![relay.public_key()]))).unwrap();
    let mut carried = 0;
    let mut consumer: Option<JoinHandle<()>> = None;
    while carried < times() {
        let mut stream = prepared(wan.accept().unwrap().0);
        let mut session = Connection::Server(ServerConnection::new(config.clone()).unwrap());
        shake_hands(&mut stream, &mut session);
        let mut request = [0; 64];
        read_plain(&mut stream, &mut session, &mut request);
        let mut answer = [0; 32];
        answer[..6].copy_from_slice(b"S2DR\x01\x00");
        answer[8..12].copy_from_slice(&300_u32.to_be_bytes());
        session.writer().write_all(&answer).unwrap();
        session.send_close_notify();
        let mut train = pending(&mut session);
        let is_data = request[5] == 1;
        if is_data {
            train.extend(payload(carried + 7));
        }
        let mut writing = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writing.write_all(&train).unwrap();
            let shut = writing.shutdown(Shutdown::Write);
            assert!(shut.is_ok() || !is_data, "{shut:?}"); // a probe may be gone already
        });
        read_close_notify(&mut stream, &mut session);
        if is_data {
            assert_arrives(&mut stream, &payload(carried));
            consumer.take().unwrap().join().unwrap();
            carried += 1;
        }
        sender.join().unwrap();
        if consumer.is_none() && carried < times() {
            let application = TcpStream::connect(relay.address()).unwrap();
            consumer = Some(exchange(application, payload(carried), payload(carried + 7)));
        }
    }
}
