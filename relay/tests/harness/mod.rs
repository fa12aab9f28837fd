//! What the tests that speak with a relay as its peer have in common: the relay, the two applications, and the other end of a
//! session. Of its users none needs all of it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::Connection;
use serde_json::{Value, json};

use crate::key::PublicKey;

pub const PAYLOAD_BYTES: usize = 1 << 20;
pub const RELAY_ID: &str = "00112233445566778899aabbccddeeff";
pub const DEADLINE: Duration = Duration::from_secs(30);
const HEADER_BYTES: usize = 5;

/// A relay in the foreground, killed with the test.
pub struct Relay {
    pub process: Child,
    ready: Value,
    directory: std::path::PathBuf,
}

impl Relay {
    pub fn start(name: &str, settings: Value) -> Relay {
        let directory = std::env::temp_dir().join(format!("s2ds-{name}-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
        let mut config = json!({
            "protocol": 1, "relay_id": RELAY_ID, "sources": ["127.0.0.1"], "until": "released",
            "listen": {"address": "127.0.0.1", "first_port": 0, "last_port": 0, "indices": [0]},
            "lease_s": 600, "lifetime_s": 600, "hello_timeout_s": 600
        });
        config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let mut process = Command::new(std::env::var("S2DS").expect("S2DS names the relay"))
            .args(["run", "--runtime-dir"])
            .arg(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        process.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(ready["event"], "ready", "{ready}");
        Relay { process, ready, directory }
    }

    /// What the relay answers to one of its verbs.
    pub fn ask(&self, verb: &str, changes: &Value) -> Value {
        let mut client = Command::new(std::env::var("S2DS").unwrap())
            .args([verb, self.ready["relay_id"].as_str().unwrap(), "--runtime-dir"])
            .arg(&self.directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // A verb that reads nothing may be gone before.
        let _ = client.stdin.take().unwrap().write_all(changes.to_string().as_bytes());
        let answer: Value = serde_json::from_slice(&client.wait_with_output().unwrap().stdout).unwrap();
        assert_eq!(answer.get("error"), None);
        answer
    }

    pub fn address(&self) -> &str {
        self.ready["listeners"][0]["address"].as_str().unwrap()
    }

    pub fn public_key(&self) -> PublicKey {
        serde_json::from_value(self.ready["public_key"].clone()).unwrap()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Bytes of which each depends on its place and on `seed`: what is lost, doubled or exchanged is seen.
pub fn payload(seed: usize) -> Vec<u8> {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    let noise = NOISE.get_or_init(|| {
        let mut state = 1_u64;
        let words = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state ^ (state >> 29)).to_le_bytes()
        });
        words.take(PAYLOAD_BYTES / 4).flatten().collect()
    });
    noise[seed..][..PAYLOAD_BYTES].to_vec()
}

pub fn prepared(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Sends `sent`, ends the direction, and checks that `expected` and nothing else comes back.
pub fn exchange(stream: TcpStream, sent: Vec<u8>, expected: Vec<u8>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reading = prepared(stream);
        let mut writing = reading.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writing.write_all(&sent).unwrap();
            writing.shutdown(Shutdown::Write).unwrap();
        });
        assert_arrives(&mut reading, &expected);
        sender.join().unwrap();
    })
}

pub fn assert_arrives(stream: &mut TcpStream, expected: &[u8]) {
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    if received != expected {
        let wrong = received.iter().zip(expected).position(|(one, other)| one != other);
        panic!("{} bytes of {} came, the first wrong one at {wrong:?}", received.len(), expected.len());
    }
}

/// Takes exactly one record out of the kernel and gives it to the session.
pub fn read_record(stream: &mut TcpStream, session: &mut Connection) {
    let mut record = vec![0; HEADER_BYTES];
    stream.read_exact(&mut record).unwrap();
    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
    record.resize(HEADER_BYTES + length, 0);
    stream.read_exact(&mut record[HEADER_BYTES..]).unwrap();
    session.read_tls(&mut record.as_slice()).unwrap();
    session.process_new_packets().unwrap();
}

pub fn pending(session: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut bytes).unwrap();
    }
    bytes
}

pub fn shake_hands(stream: &mut TcpStream, session: &mut Connection) {
    while session.is_handshaking() {
        // Of the client, the last flight stays for the train.
        let bytes = pending(session);
        stream.write_all(&bytes).unwrap();
        read_record(stream, session);
    }
}

pub fn read_plain(stream: &mut TcpStream, session: &mut Connection, buffer: &mut [u8]) {
    let mut filled = 0;
    while filled < buffer.len() {
        match session.reader().read(&mut buffer[filled..]) {
            Ok(0) => panic!("close_notify after {filled} bytes"),
            Ok(count) => filled += count,
            Err(_) => read_record(stream, session),
        }
    }
}

pub fn read_close_notify(stream: &mut TcpStream, session: &mut Connection) {
    loop {
        match session.reader().read(&mut [0]) {
            Ok(0) => return,
            Ok(_) => panic!("data before close_notify"),
            Err(_) => read_record(stream, session),
        }
    }
}

pub fn relay_id() -> [u8; 16] {
    u128::from_str_radix(RELAY_ID, 16).unwrap().to_be_bytes()
}
