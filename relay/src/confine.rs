//! What a relay gives up before it serves anybody, so that who takes it over gains little: new privileges, files, programs,
//! other processes' attention, and most system calls.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};
use serde::Serialize;

/// What was given up, as `status` reports it: `applied`, for Landlock also `partly`, or why it was not.
#[derive(Clone, Debug, Serialize)]
pub struct Confinement {
    privileges: String,
    limits: String,
    seccomp: String,
    landlock: String,
    memory: String,
}

/// Gives up what a relay does not need once its listeners, its control socket and its key are there. To be called before
/// there are threads: Landlock counts for the calling thread and those that it starts. A kernel that knows a part not is no
/// error, because older ones are in use; `status` says so.
///
/// `directory` is where the control socket is, which goes with the process. `log`: what is written to a file is the event log.
pub fn confine(directory: &Path, log: bool) -> Confinement {
    // Kept from the first time on, and found by a call that is given up.
    let _ = rustix::param::page_size();
    Confinement {
        privileges: gain_no_privileges(),
        limits: set_limits(log),
        memory: keep_memory_private(),
        landlock: forget_files(directory),
        seccomp: drop_calls(),
    }
}

fn said(outcome: Result<(), String>) -> String {
    outcome.err().unwrap_or_else(|| "applied".into())
}

/// No program that is started here ever has more rights than this process.
fn gain_no_privileges() -> String {
    said(rustix::thread::set_no_new_privs(true).map_err(|error| error.to_string()))
}

/// The number of descriptors is final, no memory is locked, and the event log keeps its bound whatever this process tries. The
/// limit for processes counts all threads of the user on the node, so it is no limit for one relay: seccomp is.
fn set_limits(log: bool) -> String {
    let set = |resource: Resource, most: Option<u64>| {
        setrlimit(resource, Rlimit { current: most, maximum: most })
            .map_err(|error| format!("{resource:?}: {error}"))
    };
    said(
        set(Resource::Nofile, getrlimit(Resource::Nofile).current)
            .and_then(|()| set(Resource::Memlock, Some(0)))
            .and_then(|()| if log { set(Resource::Fsize, Some(LARGEST_FILE_BYTES)) } else { Ok(()) }),
    )
}

/// The private key is in this memory: no core dump, and no other process of the same user reads it.
fn keep_memory_private() -> String {
    said(
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
            .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable))
            .map_err(|error| error.to_string()),
    )
}

/// Landlock: of all files only what `status` reads of this process and the removal of the control socket; no bound port but
/// such as the kernel chooses for a connection outwards; no signals to others, no abstract sockets.
fn forget_files(directory: &Path) -> String {
    let abi = ABI::V6;
    let restrict = || {
        let opened = |path: &Path| PathFd::new(path).map_err(|error| error.to_string());
        Ruleset::default()
            .handle_access(AccessFs::from_all(abi))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::BindTcp))
            .and_then(|ruleset| ruleset.scope(Scope::from_all(abi)))
            .and_then(Ruleset::create)
            .and_then(|ruleset| ruleset.add_rule(NetPort::new(0, AccessNet::BindTcp)))
            .map_err(|error| error.to_string())
            .and_then(|ruleset| {
                let own = PathBeneath::new(
                    opened(Path::new("/proc/self"))?,
                    AccessFs::ReadFile | AccessFs::ReadDir,
                );
                let socket = PathBeneath::new(opened(directory)?, AccessFs::RemoveFile);
                ruleset
                    .add_rule(own)
                    .and_then(|ruleset| ruleset.add_rule(socket))
                    .and_then(landlock::RulesetCreated::restrict_self)
                    .map_err(|error| error.to_string())
            })
    };
    match restrict() {
        Ok(status) => match status.ruleset {
            RulesetStatus::FullyEnforced => "applied".into(),
            RulesetStatus::PartiallyEnforced => "partly".into(),
            RulesetStatus::NotEnforced => "not in this kernel".into(),
        },
        Err(error) => error,
    }
}

/// Seccomp: the calls that a relay makes, and no other. What is not among them is answered as a kernel that does not have it
/// would, so that libraries fall back to what is.
fn drop_calls() -> String {
    let install = || -> Result<(), String> {
        let filter = SeccompFilter::new(
            rules()?,
            SeccompAction::Errno(libc::ENOSYS as u32),
            SeccompAction::Allow,
            std::env::consts::ARCH.try_into().map_err(|error| format!("{error}"))?,
        )
        .map_err(|error| error.to_string())?;
        let program: BpfProgram = filter.try_into().map_err(|error| format!("{error}"))?;
        apply_filter_all_threads(&program).map_err(|error| error.to_string())
    };
    said(install())
}

/// Calls with any arguments, and those that count with some only.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    rules.extend(OLD_CALLS.iter().map(|call| (*call, Vec::new())));
    let when = |conditions: &[(u8, SeccompCmpOp, u64)]| {
        conditions
            .iter()
            .map(|(argument, operator, value)| {
                SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
            })
            .collect::<Result<Vec<_>, _>>()
            .and_then(SeccompRule::new)
            .map_err(|error| error.to_string())
    };
    let tcp = |family: i32| {
        let kind = SeccompCmpOp::MaskedEq(SOCKET_KIND);
        when(&[(0, SeccompCmpOp::Eq, family as u64), (1, kind, libc::SOCK_STREAM as u64)])
    };
    let not_executable = || when(&[(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)]);
    let thread = libc::CLONE_THREAD as u64;
    rules.extend([
        // TCP, and nothing else: no datagrams, no raw sockets, no netlink, no Unix sockets to anybody.
        (libc::SYS_socket, vec![tcp(libc::AF_INET)?, tcp(libc::AF_INET6)?]),
        // No memory ever becomes a program.
        (libc::SYS_mmap, vec![not_executable()?]),
        (libc::SYS_mprotect, vec![not_executable()?]),
        // Threads, no processes. Of clone3 a filter does not see the flags; libraries fall back to this.
        (libc::SYS_clone, vec![when(&[(0, SeccompCmpOp::MaskedEq(thread), thread)])?]),
        (libc::SYS_prctl, vec![when(&[(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)])?]),
    ]);
    Ok(rules)
}

/// More than the event log ever takes: reaching it would end the process.
const LARGEST_FILE_BYTES: u64 = 2 << 20;

/// The bits of a socket's type that are no flags.
const SOCKET_KIND: u64 = 0xf;

/// Grouped by what needs them.
const CALLS: &[i64] = &[
    // carrying
    libc::SYS_splice,
    libc::SYS_pipe2,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    // connections
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // waiting
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // memory and randomness
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    // threads and signals
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_socketpair,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // who we are, and what `status` tells of it
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_openat,
    libc::SYS_statx,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_unlinkat,
    libc::SYS_dup3,
];

/// What newer architectures do not have any more.
#[cfg(target_arch = "x86_64")]
const OLD_CALLS: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_unlink, libc::SYS_dup2];
