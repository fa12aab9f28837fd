//! What is left to a relay after it has given up the rest. The test gives it up itself, and so has its process to itself:
//! `cargo test --test confinement -- --ignored`.

#[path = "../src/confine.rs"]
mod confine;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::Command;

#[test]
#[ignore = "it confines its process"]
fn a_confined_process_can_carry_streams_and_little_else() {
    let directory = std::env::temp_dir().join(format!("confined-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("socket"), "").unwrap();
    let elsewhere = std::env::temp_dir().join(format!("elsewhere-{}", std::process::id()));
    std::fs::write(&elsewhere, "").unwrap();
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = target.local_addr().unwrap();

    let given_up = serde_json::to_value(confine::confine(&directory, true)).unwrap();
    assert_eq!(given_up["seccomp"], "applied");
    assert_eq!(given_up["memory"], "applied");
    assert_eq!(given_up["privileges"], "applied");
    assert_eq!(given_up["limits"], "applied");
    let landlock = given_up["landlock"] != "not in this kernel";

    // What a stream needs goes on: connections, threads, its own status, the removal of its socket.
    let thread = std::thread::spawn(move || target.accept().unwrap().0.write_all(b"through").unwrap());
    let mut said = String::new();
    TcpStream::connect(address).unwrap().read_to_string(&mut said).unwrap();
    thread.join().unwrap();
    assert_eq!(said, "through");
    assert!(std::fs::read_to_string("/proc/self/statm").is_ok());
    assert!(std::fs::remove_file(directory.join("socket")).is_ok());

    // No programs, no other listeners, no datagrams, no other services of the machine.
    assert!(Command::new("/bin/true").spawn().is_err());
    assert_eq!(TcpListener::bind("127.0.0.1:0").unwrap_err().raw_os_error(), Some(libc::ENOSYS));
    assert_eq!(UdpSocket::bind("127.0.0.1:0").unwrap_err().raw_os_error(), Some(libc::ENOSYS));
    assert_eq!(UnixStream::connect("/run/any").unwrap_err().raw_os_error(), Some(libc::ENOSYS));
    if landlock {
        for path in ["/etc/passwd", "/proc/1/status"] {
            assert_eq!(File::open(path).unwrap_err().kind(), ErrorKind::PermissionDenied, "{path}");
        }
        assert_eq!(File::create(directory.join("new")).unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert_eq!(std::fs::remove_file(&elsewhere).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}
