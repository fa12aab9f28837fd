//! The records of mode `tls`: two relays and their applications, or a relay and a peer whose records are rustls'.
//!
//! Driven by tests/relay/test_kernel_tls.py, inside a virtual machine with a stock kernel that has TLS, and by
//! tests/relay/test_records.py on any. S2DS names the relay, CIPHER the cipher that the kernel is to get; without it, the
//! relay makes the records itself, if the kernel cannot.

mod harness;
#[path = "../src/hkdf.rs"]
mod hkdf;
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
use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConnection, Connection};
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

    fn assert_carried_as_wanted(&self) {
        for relay in [&self.prod, &self.cons] {
            let stream = &relay.ask("status", &Value::Null)["streams"][0];
            assert_carried_as_wanted(stream);
            if cipher().is_some() {
                assert_eq!(
                    stream["path"],
                    json!({"to_consumer": SPLICED, "to_producer": SPLICED}),
                    "{stream}"
                );
            }
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

/// What the kernel is to get, if it is to get something.
fn cipher() -> Option<String> {
    std::env::var("CIPHER").ok()
}

fn has_new_keys() -> bool {
    cipher().is_none_or(|cipher| cipher == "AES-256-GCM")
}

/// What the status says of a connection whose records are made where this run wants it.
fn assert_carried_as_wanted(stream: &Value) {
    if let Some(cipher) = cipher() {
        assert_eq!(stream["path_reason"], json!(format!("{cipher} by the kernel")), "{stream}");
    }
}

/// So many MiB, each of its own noise.
fn large(seed: usize, mebibytes: usize) -> Vec<u8> {
    (0..mebibytes).map(|number| payload(seed + number)).collect::<Vec<_>>().concat()
}

/// A counter of this kernel's TLS over all connections.
fn counted(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/net/tls_stat").unwrap_or_default();
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn both_directions_at_once_arrive_whole_and_are_spliced() {
    let path = Path::open("whole", json!({}));
    let (mut consumer, mut producer) = path.connect();
    echo(&mut consumer, b"the first message", &mut producer);
    path.assert_carried_as_wanted();
    let there = exchange(producer, large(1, 48), large(2, 48));
    let here = exchange(consumer, large(2, 48), large(1, 48));
    here.join().unwrap();
    there.join().unwrap();
    path.wait_closed();
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn what_is_said_before_the_way_is_open_arrives_and_the_end_waits_for_no_more_of_it() {
    let path = Path::open("early", json!({}));
    let cons = Pid::from_child(&path.cons.process);
    for length in [1, 959, 960, 961, 50_000] {
        kill_process(cons, Signal::STOP).unwrap();
        let mut consumer = prepared(TcpStream::connect(path.cons.address()).unwrap());
        consumer.write_all(&payload(1)[..length]).unwrap();
        kill_process(cons, Signal::CONT).unwrap();
        let mut producer = prepared(path.producer.accept().unwrap().0);
        let mut early = vec![0; length];
        producer.read_exact(&mut early).unwrap();
        assert_eq!(early, &payload(1)[..length]);
        echo(&mut consumer, b"the next message", &mut producer);
        path.assert_carried_as_wanted();
        let there = exchange(producer, payload(2), payload(3));
        exchange(consumer, payload(3), payload(2)).join().unwrap();
        there.join().unwrap();
        path.wait_closed();
    }
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn a_reader_that_pauses_gets_all_that_was_sent_before_the_end() {
    const SETTING: &str = "/proc/sys/net/ipv4/tcp_wmem";
    let usual = std::fs::read(SETTING).unwrap();
    // Only in a machine of its own.
    let alters = cipher().is_some();
    if alters {
        std::fs::write(SETTING, "4096 4096 8192").unwrap();
    }
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
    if alters {
        std::fs::write(SETTING, usual).unwrap();
    }
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn no_key_makes_more_records_than_it_may() {
    let path = Path::open("limit", json!({"records_per_key": 1024}));
    let (mut consumer, mut producer) = path.connect();
    echo(&mut consumer, b"the first message", &mut producer);
    path.assert_carried_as_wanted();
    let before = (counted("TlsTxRekeyOk"), counted("TlsRxRekeyOk"));
    let there = exchange(producer, large(6, 32), large(7, 32));
    let here = exchange(consumer, large(7, 32), large(6, 32));
    here.join().unwrap();
    there.join().unwrap();
    path.wait_closed();
    if cipher().is_none() {
        return; // that every record was opened is what the bytes say, and src/record.rs counts them
    }
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
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

/// A relay, and a peer with records of its own that has asked it for a data connection.
struct Call {
    relay: Relay,
    session: Connection,
    stream: TcpStream,
    application: TcpStream,
}

impl Call {
    /// `early` stands in one record with the request.
    fn open(name: &str, ciphers: Ciphers, early: &[u8]) -> Call {
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
        send(&mut stream, &mut session, &[&request, early].concat());
        let application = prepared(producer.accept().unwrap().0);
        let mut answer = [0; 32];
        read_plain(&mut stream, &mut session, &mut answer);
        assert_eq!(answer[..6], *b"S2DR\x01\x00");
        Call { relay, session, stream, application }
    }

    /// With a cipher that the kernel can carry, if it is to.
    fn as_wanted(name: &str) -> Call {
        let call = Call::open(name, Ciphers { chacha_first: !has_new_keys(), ..Ciphers::default() }, b"");
        assert_carried_as_wanted(&call.relay.ask("status", &Value::Null)["streams"][0]);
        call
    }

    fn send(&mut self, bytes: &[u8]) {
        send(&mut self.stream, &mut self.session, bytes);
    }

    /// A relay that makes its records itself says why it ends a session.
    fn assert_peer_hears(&mut self, alert: AlertDescription) {
        if cipher().is_some() {
            return;
        }
        let heard = loop {
            if self.session.read_tls(&mut self.stream).unwrap() == 0 {
                panic!("no alert");
            }
            if let Err(error) = self.session.process_new_packets() {
                break error;
            }
        };
        assert_eq!(heard, rustls::Error::AlertReceived(alert));
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn a_peer_that_changes_its_key_is_understood() {
    let mut call = Call::as_wanted("rekey");
    call.send(&payload(1)[..100_000]);
    call.assert_application_gets(&payload(1)[..100_000]);
    if has_new_keys() {
        for round in 2..10 {
            call.session.refresh_traffic_keys().unwrap();
            call.send(&payload(round)[..100_000]);
            call.assert_application_gets(&payload(round)[..100_000]);
            // The answer is under a new key too: the peer has asked for that.
            call.application.write_all(&payload(round)[..1000]).unwrap();
            let mut answer = [0; 1000];
            read_plain(&mut call.stream, &mut call.session, &mut answer);
            assert!(answer == payload(round)[..1000]);
        }
    }
    // After a pause in which a relay gives up what it can make again, it goes on, and ends as every other.
    std::thread::sleep(Duration::from_millis(1300));
    call.send(b"goodbye");
    call.assert_application_gets(b"goodbye");
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn an_end_of_the_wan_without_close_notify_is_an_abort() {
    let mut call = Call::as_wanted("cut");
    call.send(b"half of a message");
    call.assert_application_gets(b"half of a message");
    call.stream.shutdown(Shutdown::Write).unwrap();
    assert_reset(&mut call.application);
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn a_record_that_was_changed_on_its_way_is_an_abort_and_nothing_of_it_arrives() {
    let mut call = Call::as_wanted("changed");
    call.send(b"a message");
    call.session.writer().write_all(b"another message").unwrap();
    let mut train = pending(&mut call.session);
    train[8] ^= 1;
    call.stream.write_all(&train).unwrap();
    call.assert_application_gets(b"a message");
    assert_reset(&mut call.application);
    call.assert_peer_hears(AlertDescription::BadRecordMac);
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn all_that_was_in_order_before_a_record_that_is_not_arrives() {
    let mut call = Call::as_wanted("before");
    let mut train = Vec::new();
    for message in payload(4)[..100_000].chunks(100) {
        call.session.writer().write_all(message).unwrap();
        train.extend(pending(&mut call.session));
    }
    *train.last_mut().unwrap() ^= 1;
    call.stream.write_all(&train).unwrap();
    call.assert_application_gets(&payload(4)[..99_900]);
    assert_reset(&mut call.application);
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn a_record_that_is_too_long_or_none_is_an_abort_before_it_is_there() {
    for (header, alert) in [
        (&[23, 3, 3, 65, 1], AlertDescription::RecordOverflow),
        (&[22, 3, 3, 0, 40], AlertDescription::UnexpectedMessage),
    ] {
        let mut call = Call::as_wanted(&format!("none-{}", header[0]));
        call.send(b"a message");
        call.assert_application_gets(b"a message");
        call.stream.write_all(header).unwrap();
        if cipher().is_some() {
            // The kernel may look at a header only with what follows it; or be done with it by now.
            let _ = call.stream.write_all(&[0; 1 << 15]);
        }
        assert_reset(&mut call.application);
        call.assert_peer_hears(alert);
    }
}

/// The kernel cannot be given such a session; it is carried all the same.
#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn what_stands_in_one_record_with_the_request_or_right_behind_it_arrives() {
    let mut call = Call::open("early", Ciphers::default(), b"early, ");
    call.send(&payload(3));
    call.assert_application_gets(b"early, ");
    call.assert_application_gets(&payload(3));
}

#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn records_come_in_pieces_of_any_length() {
    let mut call = Call::as_wanted("any");
    for message in [&payload(1)[..1], &payload(2)[..17_000], &payload(3)[..70_000]] {
        call.session.writer().write_all(&message[..message.len().min(60_000)]).unwrap();
        let train = pending(&mut call.session);
        for piece in train.chunks(train.len().min(977)) {
            call.stream.write_all(piece).unwrap();
        }
        call.assert_application_gets(&message[..message.len().min(60_000)]);
    }
}

/// The kernel has TLS, and yet it does not get a cipher that it could not carry to the end.
#[test]
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
fn a_peer_that_wants_a_cipher_without_end_gets_it_in_user_space() {
    if has_new_keys() {
        return; // then there is none
    }
    let mut call = Call::open("user-space", Ciphers::default(), b"");
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
#[ignore = "needs a relay: tests/relay/test_kernel_tls.py and test_records.py run it"]
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
