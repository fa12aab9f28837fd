//! Mode `tls` on a kernel that has TLS: two relays and their applications, or a relay and a peer that makes its records itself.
//!
//! Driven by tests/relay/test_kernel_tls.py, inside a virtual machine with a stock kernel. S2DS names the relay, CIPHER the
//! cipher that its kernel is to get.

mod harness;
#[path = "../src/key.rs"]
#[allow(dead_code)]
mod key;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use harness::*;
use key::{Ciphers, Identity};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection};
use serde_json::{Value, json};

const SPLICED: &str = "ktls-splice";

/// Two relays with a producer behind PROD. Both run on this kernel.
struct Path {
    prod: Relay,
    cons: Relay,
    producer: TcpListener,
}

impl Path {
    fn open(name: &str, settings: Value) -> Path {
        let producer = TcpListener::bind("127.0.0.1:0").unwrap();
        let prod = start(
            &format!("{name}-prod"),
            json!({"role": "PROD", "targets": [producer.local_addr().unwrap().to_string()]}),
            &settings,
        );
        let listeners = json!([{"index": 0, "address": prod.address()}]);
        let cons = start(
            &format!("{name}-cons"),
            json!({
                "role": "CONS", "probe": "path",
                "peers": [{"relay_id": RELAY_ID, "public_key": prod.public_key(), "listeners": listeners}]
            }),
            &settings,
        );
        let peers = json!([{"public_key": cons.public_key(), "source_addresses": []}]);
        prod.ask("update", &json!({"protocol": 1, "peers": peers}));
        Path { prod, cons, producer }
    }

    /// One connection: the consumer's end and the producer's.
    fn connect(&self) -> (TcpStream, TcpStream) {
        let consumer = prepared(TcpStream::connect(self.cons.address()).unwrap());
        (consumer, prepared(self.producer.accept().unwrap().0))
    }

    /// Waits until both relays have closed their connections, in order: then they had sent all of their records.
    fn wait_closed(&self) {
        let deadline = Instant::now() + DEADLINE;
        for relay in [&self.prod, &self.cons] {
            loop {
                let connections = &relay.ask("status", &Value::Null)["connections"];
                assert_eq!(connections["aborted"], 0);
                if connections["active"] == 0 {
                    break;
                }
                assert!(Instant::now() < deadline, "{connections}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn assert_the_kernel_carries(&self) {
        for relay in [&self.prod, &self.cons] {
            let status = relay.ask("status", &Value::Null);
            let stream = &status["streams"][0];
            assert_eq!(stream["path"], json!({"to_consumer": SPLICED, "to_producer": SPLICED}), "{status}");
            assert_eq!(stream["path_reason"], json!(format!("{} by the kernel", cipher())), "{status}");
        }
    }
}

fn start(name: &str, role: Value, settings: &Value) -> Relay {
    let mut config = json!({"mode": "tls"});
    for part in [&role, settings] {
        config.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    }
    Relay::start(name, config)
}

fn cipher() -> String {
    std::env::var("CIPHER").expect("CIPHER names what the kernel is to get")
}

fn has_new_keys() -> bool {
    cipher() == "AES-256-GCM"
}

/// So many MiB, each of its own noise.
fn large(seed: usize, mebibytes: usize) -> Vec<u8> {
    (0..mebibytes).map(|number| payload(seed + number)).collect::<Vec<_>>().concat()
}

/// A counter of this kernel's TLS over all connections.
fn counted(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/net/tls_stat").unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    line.map_or(0, |line| line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

fn echo(stream: &mut TcpStream, message: &[u8], answering: &mut TcpStream) {
    let mut got = vec![0; message.len()];
    stream.write_all(message).unwrap();
    answering.read_exact(&mut got).unwrap();
    answering.write_all(&got).unwrap();
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, message);
}

fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream.as_fd(), Some(Duration::ZERO)).unwrap();
}

/// Reads to the end, which must be a reset and no end of file.
fn assert_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        Ok(length) => panic!("a clean end after {length} bytes"),
    }
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn both_directions_at_once_arrive_whole_and_are_spliced() {
    let path = Path::open("whole", json!({}));
    let (mut consumer, mut producer) = path.connect();
    echo(&mut consumer, b"the first message", &mut producer);
    path.assert_the_kernel_carries();
    let there = exchange(producer, large(1, 48), large(2, 48));
    let here = exchange(consumer, large(2, 48), large(1, 48));
    here.join().unwrap();
    there.join().unwrap();
    path.wait_closed();
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn an_answer_given_after_the_end_of_the_question_arrives() {
    let path = Path::open("half", json!({}));
    for round in 0..20 {
        let (consumer, mut producer) = path.connect();
        let answering = std::thread::spawn(move || {
            assert_arrives(&mut producer, &payload(round));
            std::thread::sleep(Duration::from_millis(10));
            producer.write_all(&payload(round + 9)).unwrap();
        });
        exchange(consumer, payload(round), payload(round + 9)).join().unwrap();
        answering.join().unwrap();
    }
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn small_messages_go_back_and_forth_and_none_is_held_back() {
    let path = Path::open("small", json!({}));
    let (mut consumer, mut producer) = path.connect();
    for length in (1..200).chain([4095, 4096, 4097, 16383, 16384, 16385, 65536]) {
        echo(&mut consumer, &payload(length)[..length], &mut producer);
        echo(&mut producer, &payload(length)[..length], &mut consumer);
    }
}

/// The last records are still on their way when both ends have been said. With a send buffer of less than a record, Linux 6.1
/// stops for ever unless it is told to send what it has.
#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn a_reader_that_pauses_gets_all_that_was_sent_before_the_end() {
    const SETTING: &str = "/proc/sys/net/ipv4/tcp_wmem";
    let usual = std::fs::read(SETTING).unwrap();
    std::fs::write(SETTING, "4096 4096 8192").unwrap();
    let path = Path::open("pause", json!({}));
    for round in 0..40 {
        let (mut consumer, mut producer) = path.connect();
        // Nothing comes from the consumer: that direction ends first.
        consumer.shutdown(Shutdown::Write).unwrap();
        assert_arrives(&mut producer, b"");
        let sent = payload(round)[..200_000 + 4321 * round].to_vec();
        let expected = sent.clone();
        let sending = std::thread::spawn(move || producer.write_all(&sent).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        assert_arrives(&mut consumer, &expected);
        sending.join().unwrap();
    }
    std::fs::write(SETTING, usual).unwrap();
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn messages_of_a_hundred_bytes_arrive_in_order_at_a_slow_reader() {
    let path = Path::open("pieces", json!({}));
    let (consumer, mut producer) = path.connect();
    let sent = payload(5);
    let expected = sent.clone();
    let sending = std::thread::spawn(move || {
        for piece in sent.chunks(100) {
            producer.write_all(piece).unwrap();
        }
    });
    consumer.shutdown(Shutdown::Write).unwrap();
    let mut consumer = consumer;
    let mut received = Vec::new();
    let mut piece = vec![0; 30_000];
    loop {
        let length = consumer.read(&mut piece).unwrap();
        if length == 0 {
            break;
        }
        received.extend_from_slice(&piece[..length]);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(received == expected, "{} bytes of {}", received.len(), expected.len());
    sending.join().unwrap();
}

/// Fails, with the limit ignored, by the counters of the kernel; with a key that only one side has changed, by the bytes.
#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn no_key_makes_more_records_than_it_may() {
    let path = Path::open("limit", json!({"records_per_key": 1024}));
    let (mut consumer, mut producer) = path.connect();
    echo(&mut consumer, b"the first message", &mut producer);
    path.assert_the_kernel_carries();
    let before = (counted("TlsTxRekeyOk"), counted("TlsRxRekeyOk"));
    let there = exchange(producer, large(6, 32), large(7, 32));
    let here = exchange(consumer, large(7, 32), large(6, 32));
    here.join().unwrap();
    there.join().unwrap();
    path.wait_closed();
    let changed = (counted("TlsTxRekeyOk") - before.0, counted("TlsRxRekeyOk") - before.1);
    if has_new_keys() {
        // 2048 full records each way need two keys after the first one, at the least.
        assert!(changed.0 >= 2 && changed.1 >= 2, "{changed:?}");
    } else {
        assert_eq!(changed, (0, 0), "ChaCha20-Poly1305 needs no new keys");
    }
    assert_eq!((counted("TlsTxRekeyError"), counted("TlsRxRekeyError")), (0, 0));
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn an_abort_of_an_application_is_one_for_the_other() {
    let path = Path::open("abort", json!({}));
    let (mut consumer, mut producer) = path.connect();
    echo(&mut consumer, b"a word", &mut producer);
    reset(producer);
    assert_reset(&mut consumer);
    let (mut consumer, mut producer) = path.connect();
    echo(&mut consumer, b"a word", &mut producer);
    reset(consumer);
    assert_reset(&mut producer);
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn a_relay_that_is_killed_is_an_abort_for_both_applications() {
    for kills_prod in [true, false] {
        let mut path = Path::open(if kills_prod { "kill-prod" } else { "kill-cons" }, json!({}));
        let (mut consumer, mut producer) = path.connect();
        echo(&mut consumer, b"a word", &mut producer);
        let relay = if kills_prod { &mut path.prod } else { &mut path.cons };
        relay.process.kill().unwrap();
        assert_reset(&mut consumer);
        assert_reset(&mut producer);
    }
}

/// A relay whose kernel carries, and a peer in user space that has asked it for a data connection.
struct Call {
    relay: Relay,
    session: Connection,
    stream: TcpStream,
    application: TcpStream,
}

impl Call {
    fn open(name: &str, ciphers: Ciphers) -> Call {
        let identity = Identity::generate(ciphers).unwrap();
        let producer = TcpListener::bind("127.0.0.1:0").unwrap();
        let peers = json!([{"public_key": identity.public, "source_addresses": []}]);
        let target = producer.local_addr().unwrap().to_string();
        let settings = json!({"role": "PROD", "targets": [target], "peers": peers});
        let relay = start(name, settings, &json!({}));
        let mut stream = prepared(TcpStream::connect(relay.address()).unwrap());
        let config = identity.client(relay.public_key()).unwrap();
        let name = ServerName::try_from("s2ds.invalid").unwrap();
        let mut session = Connection::Client(ClientConnection::new(config, name).unwrap());
        shake_hands(&mut stream, &mut session);
        let mut request = [0; 64];
        request[..8].copy_from_slice(&[b'S', b'2', b'D', b'S', 1, 1, 1, 0]);
        request[8..24].copy_from_slice(&relay_id());
        send(&mut stream, &mut session, &request);
        let application = prepared(producer.accept().unwrap().0);
        let mut answer = [0; 32];
        read_plain(&mut stream, &mut session, &mut answer);
        assert_eq!(answer[..6], *b"S2DR\x01\x00");
        Call { relay, session, stream, application }
    }

    /// What both have in common, if the kernel can carry it.
    fn of_the_kernel(name: &str) -> Call {
        let call = Call::open(name, Ciphers { chacha_first: !has_new_keys(), ..Ciphers::default() });
        let status = call.relay.ask("status", &Value::Null);
        assert_eq!(status["streams"][0]["path_reason"], format!("{} by the kernel", cipher()));
        call
    }

    fn send(&mut self, bytes: &[u8]) {
        send(&mut self.stream, &mut self.session, bytes);
    }

    fn assert_application_gets(&mut self, expected: &[u8]) {
        let mut got = vec![0; expected.len()];
        self.application.read_exact(&mut got).unwrap();
        assert!(got == expected);
    }
}

fn send(stream: &mut TcpStream, session: &mut Connection, bytes: &[u8]) {
    for piece in bytes.chunks(32 << 10) {
        session.writer().write_all(piece).unwrap();
        let train = pending(session);
        stream.write_all(&train).unwrap();
    }
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn a_peer_that_changes_its_key_is_understood() {
    let mut call = Call::of_the_kernel("rekey");
    call.send(&payload(1)[..100_000]);
    call.assert_application_gets(&payload(1)[..100_000]);
    if has_new_keys() {
        for round in 2..10 {
            call.session.refresh_traffic_keys().unwrap();
            call.send(&payload(round)[..100_000]);
            call.assert_application_gets(&payload(round)[..100_000]);
        }
    }
    // And it ends as every other.
    call.session.send_close_notify();
    let train = pending(&mut call.session);
    call.stream.write_all(&train).unwrap();
    assert_arrives(&mut call.application, b"");
    call.application.write_all(b"goodbye").unwrap();
    call.application.shutdown(Shutdown::Write).unwrap();
    let mut answer = [0; 7];
    read_plain(&mut call.stream, &mut call.session, &mut answer);
    assert_eq!(&answer, b"goodbye");
    read_close_notify(&mut call.stream, &mut call.session);
    assert_arrives(&mut call.stream, b"");
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn an_end_of_the_wan_without_close_notify_is_an_abort() {
    let mut call = Call::of_the_kernel("cut");
    call.send(b"half of a message");
    call.assert_application_gets(b"half of a message");
    call.stream.shutdown(Shutdown::Write).unwrap();
    assert_reset(&mut call.application);
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn a_record_that_was_changed_on_its_way_is_an_abort_and_nothing_of_it_arrives() {
    let mut call = Call::of_the_kernel("changed");
    call.send(b"a message");
    call.session.writer().write_all(b"another message").unwrap();
    let mut train = pending(&mut call.session);
    train[8] ^= 1;
    call.stream.write_all(&train).unwrap();
    call.assert_application_gets(b"a message");
    assert_reset(&mut call.application);
}

/// The kernel has TLS, and yet it does not get a cipher that it could not carry to the end.
#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn a_peer_that_wants_a_cipher_without_end_gets_it_in_user_space() {
    if has_new_keys() {
        return; // then there is none
    }
    let mut call = Call::open("user-space", Ciphers::default());
    let sent = payload(1);
    let application = {
        let application = call.application.try_clone().unwrap();
        exchange(application, vec![], sent.clone())
    };
    call.send(&sent);
    let status = call.relay.ask("status", &Value::Null);
    let stream = &status["streams"][0];
    assert_eq!(stream["path"], json!({"to_consumer": "tls-copy", "to_producer": "tls-copy"}));
    assert_eq!(stream["path_reason"], "the TLS of this kernel takes no new keys, which AES-GCM needs");
    call.session.send_close_notify();
    let train = pending(&mut call.session);
    call.stream.write_all(&train).unwrap();
    application.join().unwrap();
}

#[test]
#[ignore = "needs kernel TLS: tests/relay/test_kernel_tls.py runs it"]
fn many_connections_at_once_arrive_whole() {
    let path = Path::open("many", json!({}));
    let began = Instant::now();
    let ends: Vec<JoinHandle<()>> = (0..16)
        .flat_map(|number| {
            let (consumer, producer) = path.connect();
            [
                exchange(producer, payload(number), payload(number + 99)),
                exchange(consumer, payload(number + 99), payload(number)),
            ]
        })
        .collect();
    for end in ends {
        end.join().unwrap();
    }
    println!("16 connections took {:?}", began.elapsed());
}
