//! What the filters say, read off their file. That nothing else is needed, and each rule is, the integration tests show.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/seccomp/x86_64.json");

/// The file, without what another libc needs.
fn file() -> Value {
    let mut json: Value = serde_json::from_slice(&std::fs::read(FILE).unwrap()).unwrap();
    let other = if cfg!(target_env = "musl") { "(glibc)" } else { "(musl)" };
    for filter in json.as_object_mut().unwrap().values_mut() {
        let rules = filter["filter"].as_array_mut().unwrap();
        rules.retain(|rule| !rule["comment"].as_str().unwrap().ends_with(other));
    }
    json
}

fn filters() -> BTreeMap<String, Vec<Value>> {
    let rules = |filter: &Value| filter["filter"].as_array().unwrap().clone();
    file().as_object().unwrap().iter().map(|(name, filter)| (name.clone(), rules(filter))).collect()
}

fn system_calls(rules: &[Value]) -> BTreeSet<&str> {
    rules.iter().map(|rule| rule["syscall"].as_str().unwrap()).collect()
}

/// The conditions of a rule: argument, operator, value.
fn conditions(rule: &Value) -> BTreeSet<String> {
    let conditions = rule.get("args").and_then(Value::as_array).cloned().unwrap_or_default();
    conditions.iter().map(|c| format!("{} {} {}", c["index"], c["op"], c["val"])).collect()
}

#[test]
fn few_system_calls_are_allowed() {
    let filters = filters();
    let all: BTreeSet<_> = filters.values().flat_map(|rules| system_calls(rules)).collect();
    assert!(all.len() <= 50, "{} system calls: {all:?}", all.len());
    let vcpu = system_calls(&filters["vcpu"]);
    assert!(vcpu.len() <= 20, "{} system calls: {vcpu:?}", vcpu.len());
}

#[test]
fn what_would_undo_the_confinement_is_not_among_them() {
    for (thread, rules) in filters() {
        let calls = system_calls(&rules);
        for call in [
            "execve",
            "execveat",
            "clone",
            "clone3",
            "fork",
            "vfork",
            "ptrace",
            "process_vm_writev",
            "mprotect",
            "pkey_mprotect",
            "io_uring_setup",
            "bpf",
            "mount",
            "unshare",
            "setns",
            "kill",
            "tkill",
            "prctl",
            "seccomp",
            "memfd_create",
            "bind",
            "listen",
            "userfaultfd",
            "perf_event_open",
        ] {
            assert!(!calls.contains(call), "{thread}: {call}");
        }
    }
}

#[test]
fn arguments_are_checked_where_they_decide() {
    for (thread, rules) in filters() {
        for rule in rules {
            let call = rule["syscall"].as_str().unwrap();
            // The argument that says what the call does.
            let deciding = match call {
                "ioctl" | "futex" | "fcntl" | "io_uring_register" => &[1][..],
                "socket" => &[0, 1],
                "mmap" => &[2],
                "madvise" | "sendmsg" | "recvmsg" => &[2],
                "tgkill" => &[0, 2],
                "accept4" | "recvfrom" => &[3],
                "openat" => &[0],
                _ => continue,
            };
            let checked = conditions(&rule);
            for index in deciding {
                assert!(checked.iter().any(|c| c.starts_with(&format!("{index} "))), "{thread}: {call}: {checked:?}");
            }
            if call == "mmap" {
                assert!(checked.contains("2 \"eq\" 3") || checked.contains("2 {\"masked_eq\":4} 0"), "{checked:?}");
            }
        }
    }
}

#[test]
fn no_rule_is_part_of_another() {
    for (thread, rules) in filters() {
        for (index, rule) in rules.iter().enumerate() {
            for (other_index, other) in rules.iter().enumerate() {
                let same = index != other_index && rule["syscall"] == other["syscall"];
                // All that the other asks for is asked for here: whatever this one allows, the other does.
                let subsumed = same && conditions(other).is_subset(&conditions(rule));
                assert!(!subsumed, "{thread}: {rule} is part of {other}");
            }
        }
    }
}

#[test]
fn every_rule_and_every_number_has_its_reason() {
    for (thread, rules) in filters() {
        for rule in rules {
            let reason = |value: &Value| value["comment"].as_str().is_some_and(|comment| comment.len() > 3);
            assert!(reason(&rule), "{thread}: {rule}");
            let arguments = rule.get("args").and_then(Value::as_array).cloned().unwrap_or_default();
            assert!(arguments.iter().all(reason), "{thread}: {rule}");
        }
    }
}

/// What a filter returns for a system call: the statements that filters are made of (linux/filter.h).
fn evaluate(program: &[sock_filter], number: u32, architecture: u32, arguments: [u64; 6]) -> u32 {
    let word = |offset: u32| match offset {
        0 => number,
        4 => architecture,
        _ => (arguments[(offset as usize - 16) / 8] >> (8 * (offset % 8))) as u32,
    };
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at].clone();
        let branch = |taken: bool| usize::from(if taken { jt } else { jf });
        at += 1;
        match code {
            // Nothing uses the index register.
            0x01 => {}
            0x20 => accumulator = word(k),
            0x54 => accumulator &= k,
            0xa4 => accumulator ^= k,
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            0x06 => return k,
            other => panic!("statement {other:#x}"),
        }
    }
}

/// The filters that are built in were compiled by ourselves, to be cheap to install; those of a file by seccompiler.
#[test]
fn what_is_built_in_decides_as_seccompiler_would() {
    const X86_64: u32 = 0xc000_003e;
    let filters = filters();
    let copy = tempfile::NamedTempFile::new().unwrap();
    serde_json::to_writer(&copy, &file()).unwrap();
    let loaded = Filters::load(copy.path()).unwrap();
    for kind in ThreadKind::ALL {
        let (ours, theirs) = (Filters::BuiltIn.program(kind), loaded.program(kind));
        assert!(ours.len() < theirs.len() && ours.len() <= 160, "{kind:?}: {} of {}", ours.len(), theirs.len());
        // Every value that a rule asks for, what is beside it, and a bit more.
        let mut values = vec![0, 1, u64::MAX, 1 << 32];
        for condition in filters[kind.name()].iter().filter_map(|rule| rule["args"].as_array()).flatten() {
            let value = condition["val"].as_u64().unwrap();
            values.extend([value, value + 1, value ^ 4, value | 1 << 40]);
        }
        values.sort_unstable();
        values.dedup();
        for number in (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
            for (index, value) in (0..6).flat_map(|index| values.iter().map(move |value| (index, *value))) {
                // The second condition of a rule holds often enough.
                for other in [0, 3, 0x22] {
                    let mut arguments = [other; 6];
                    arguments[index] = value;
                    arguments[3] = if index == 3 { value } else { 0x22 };
                    let decide = |program| evaluate(program, number, X86_64, arguments);
                    assert_eq!(decide(ours), decide(theirs), "{kind:?}: {number} {arguments:?}");
                }
            }
        }
        assert_eq!(evaluate(ours, 0, 0x4000_0003, [0; 6]), evaluate(theirs, 0, 0x4000_0003, [0; 6]));
    }
}

/// Threads that meet at a lock, be it of a channel's end that both drop, depend on each other's luck.
#[test]
fn every_thread_may_wait_for_a_lock_and_wake_who_waits() {
    const X86_64: u32 = 0xc000_003e;
    for kind in ThreadKind::ALL {
        for operation in [libc::FUTEX_WAIT_BITSET, libc::FUTEX_WAKE, libc::FUTEX_WAIT] {
            let arguments = [0, (operation | libc::FUTEX_PRIVATE_FLAG) as u64, 0, 0, 0, 0];
            let decided = evaluate(Filters::BuiltIn.program(kind), libc::SYS_futex as u32, X86_64, arguments);
            assert_eq!(decided, 0x7fff_0000, "{kind:?}: {operation}");
        }
    }
}

#[test]
fn a_file_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("filters");
    let load = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Filters::load(&path).unwrap_err()
    };
    assert!(matches!(Filters::load(&dir.path().join("missing")), Err(Error::Read { .. })));
    assert!(matches!(load("{"), Error::Compile { .. }));
    let filter = r#"{"mismatch_action": "trap", "match_action": "allow", "filter": [{"syscall": "read"}]}"#;
    let missing = load(&format!(r#"{{"api": {filter}, "vmm": {filter}}}"#));
    assert!(matches!(missing, Error::Missing { thread: "vcpu", .. }), "{missing}");
    assert!(matches!(load(&format!(r#"{{"api": {}}}"#, filter.replace("read", "raed"))), Error::Compile { .. }));
}
