//! What there is to measure. The goals and the peer's figures are those of the project's performance page.

use std::error::Error;

/// Where a figure is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// In the lab, with a clock that counts instructions: comparable across machines.
    Deterministic,
    /// On this machine, in real time.
    Native,
}

impl Part {
    /// The part of that name.
    pub fn named(name: &str) -> Result<Self, Box<dyn Error>> {
        match name {
            "deterministic" => Ok(Self::Deterministic),
            "native" => Ok(Self::Native),
            other => Err(format!("--part {other:?}: must be deterministic or native").into()),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deterministic => "deterministic",
            Self::Native => "native",
        }
    }
}

/// What a figure counts. Values are kept in the base unit: seconds, bytes, or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Seconds, shown in milliseconds.
    Ms,
    /// Seconds, shown in microseconds.
    Us,
    /// Bytes, shown in MiB.
    MiB,
    /// Bytes, shown in MB.
    MB,
    /// Bytes a second, shown in MiB/s.
    Rate,
    /// A share, shown in percent.
    Percent,
    /// A number.
    Count,
}

impl Unit {
    /// Base units in one of what is shown.
    pub fn scale(self) -> f64 {
        match self {
            Self::Ms => 1e-3,
            Self::Us => 1e-6,
            Self::MiB | Self::Rate => 1_048_576.0,
            Self::MB => 1e6,
            Self::Percent => 1e-2,
            Self::Count => 1.0,
        }
    }

    /// Its symbol.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Us => "µs",
            Self::MiB => "MiB",
            Self::MB => "MB",
            Self::Rate => "MiB/s",
            Self::Percent => "%",
            Self::Count => "",
        }
    }
}

/// One line of the table.
#[derive(Debug)]
pub struct Figure {
    /// Its name on the command line and in the JSON.
    pub id: &'static str,
    /// What it is.
    pub what: &'static str,
    /// How it is shown.
    pub unit: Unit,
    /// At most this, in the shown unit.
    pub goal: Option<f64>,
    /// Firecracker's figure from the performance page, where it holds on any machine.
    pub firecracker: &'static str,
}

const fn figure(id: &'static str, what: &'static str, unit: Unit, goal: f64, firecracker: &'static str) -> Figure {
    Figure { id, what, unit, goal: Some(goal), firecracker }
}

const fn count(id: &'static str, what: &'static str) -> Figure {
    Figure { id, what, unit: Unit::Count, goal: None, firecracker: "" }
}

const fn rate(id: &'static str, what: &'static str) -> Figure {
    Figure { id, what, unit: Unit::Rate, goal: None, firecracker: "" }
}

const fn limit(id: &'static str, what: &'static str) -> Figure {
    figure(id, what, Unit::Percent, 5.0, "")
}

use Unit::{MB, MiB, Ms, Us};

const DETERMINISTIC: &[Figure] = &[
    figure("api-cpu", "process start → API answers, CPU time", Ms, 2.0, "4.1–4.8"),
    Figure { id: "start", what: "InstanceStart call → reply", unit: Ms, goal: None, firecracker: "97" },
    figure("init", "InstanceStart → init", Ms, 220.0, "311"),
    figure("exit", "process start → exit, init resets at once", Ms, 240.0, "336"),
    count("exit-exits", "  VM exits"),
    count("exit-faults", "  of them nested page faults"),
    count("exit-user", "  exits to the VMM"),
    count("exit-calls", "  system calls"),
    figure("resident", "resident outside guest RAM", MiB, 2.0, "4.2"),
    Figure { id: "dirty", what: "  of it private and dirty", unit: MiB, goal: None, firecracker: "" },
    figure("pause", "pause", Us, 200.0, "500"),
    figure("snapshot", "full snapshot", Ms, 40.0, "452"),
    count("snapshot-calls", "  system calls"),
    figure("load", "snapshot load with resume → reply", Ms, 2.0, "6.8"),
    figure("load-echo", "snapshot load → first vsock echo", Ms, 8.0, "18.7"),
    count("load-echo-exits", "  VM exits"),
    count("load-echo-faults", "  of them nested page faults"),
    count("load-echo-calls", "  system calls"),
    Figure { id: "warm", what: "load with a working set → reply", unit: Ms, goal: None, firecracker: "" },
    Figure {
        id: "warm-echo",
        what: "load with a working set → first vsock echo",
        unit: Ms,
        goal: None,
        firecracker: "",
    },
    figure("shell", "load in a prepared shell → reply", Ms, 0.5, ""),
    figure("shell-echo", "load in a prepared shell → first vsock echo", Ms, 4.0, ""),
    Figure { id: "reset", what: "reset in place → reply", unit: Ms, goal: None, firecracker: "" },
    figure("reset-echo", "reset in place → first vsock echo", Ms, 3.0, ""),
    count("reset-echo-exits", "  VM exits"),
    count("reset-echo-faults", "  of them nested page faults"),
    count("reset-echo-calls", "  system calls"),
    figure("rand-read", "block, random 4 KiB read", Us, 90.0, "117"),
    count("rand-read-exits", "  VM exits per request"),
    count("rand-read-calls", "  system calls per request"),
    figure("rand-write", "block, random 4 KiB write", Us, 90.0, "118"),
    count("rand-write-exits", "  VM exits per request"),
    count("rand-write-calls", "  system calls per request"),
    figure("seq-read", "block, 64 MiB read, 1 MiB requests", Ms, 451.0, "451"),
    count("seq-read-exits", "  VM exits per MiB"),
    count("seq-read-calls", "  system calls per MiB"),
    figure("seq-write", "block, 64 MiB write, 1 MiB requests", Ms, 462.0, "462"),
    count("seq-write-exits", "  VM exits per MiB"),
    count("seq-write-calls", "  system calls per MiB"),
    figure("vsock-connect", "InstanceStart → guest connects over vsock", Ms, 220.0, "311"),
    figure("vsock-round-trip", "vsock, round trip of 1 byte", Us, 200.0, "286"),
    count("vsock-round-trip-exits", "  VM exits"),
    count("vsock-round-trip-calls", "  system calls"),
    figure("vsock-echo", "vsock, 64 messages of 32 KiB and back", Ms, 45.0, "68"),
    count("vsock-echo-exits", "  VM exits per message"),
    count("vsock-echo-calls", "  system calls per message"),
    figure("tcp-send", "TCP, 64 MiB guest → host", Ms, 600.0, "679"),
    count("tcp-send-exits", "  VM exits per MiB"),
    count("tcp-send-interrupts", "  interrupts per MiB"),
    count("tcp-send-calls", "  system calls per MiB"),
    figure("tcp-receive", "TCP, 64 MiB host → guest", Ms, 600.0, "725"),
    count("tcp-receive-exits", "  VM exits per MiB"),
    count("tcp-receive-interrupts", "  interrupts per MiB"),
    count("tcp-receive-calls", "  system calls per MiB"),
    figure("tcp-round-trip", "TCP, round trip of 1 byte", Us, 180.0, "243"),
    count("tcp-round-trip-exits", "  VM exits"),
    count("tcp-round-trip-interrupts", "  interrupts"),
    count("tcp-round-trip-calls", "  system calls"),
    limit("limit-read-1", "block, reads, limit 1 MiB/s: missed by"),
    limit("limit-read-50", "  50 MiB/s"),
    limit("limit-read-100", "  100 requests a second"),
    limit("limit-read-5000", "  5,000 requests a second"),
    limit("limit-write-1", "block, writes, limit 1 MiB/s: missed by"),
    limit("limit-write-50", "  50 MiB/s"),
    limit("limit-write-100", "  100 requests a second"),
    limit("limit-write-5000", "  5,000 requests a second"),
    limit("limit-send-1", "network, guest → host, limit 1 MiB/s: missed by"),
    limit("limit-send-50", "  50 MiB/s"),
    limit("limit-send-100", "  100 frames a second"),
    limit("limit-send-5000", "  5,000 frames a second"),
    limit("limit-receive-1", "network, host → guest, limit 1 MiB/s: missed by"),
    limit("limit-receive-50", "  50 MiB/s"),
    limit("limit-receive-100", "  100 frames a second"),
    limit("limit-receive-5000", "  5,000 frames a second"),
    Figure { id: "bare-cpu", what: "start → API answers, CPU, not confined", unit: Ms, goal: None, firecracker: "" },
    Figure { id: "jail-cpu", what: "  in a jail", unit: Ms, goal: None, firecracker: "" },
    Figure { id: "jail-cpu-300", what: "    300 mounts on the host", unit: Ms, goal: None, firecracker: "" },
    Figure { id: "jail-ten", what: "    each of 10 at once", unit: Ms, goal: None, firecracker: "" },
    Figure { id: "chroot-cpu", what: "  in a jail, no mount namespace", unit: Ms, goal: None, firecracker: "" },
    Figure { id: "chroot-cpu-300", what: "    300 mounts on the host", unit: Ms, goal: None, firecracker: "" },
    Figure { id: "chroot-ten", what: "    each of 10 at once", unit: Ms, goal: None, firecracker: "" },
    rate("together-block", "all devices at once: drive, 16 KiB requests"),
    rate("together-tcp", "  TCP, there and back"),
    rate("together-vsock", "  vsock, there and back"),
    figure("resident-all", "resident outside guest RAM, all devices at work", MiB, 2.5, ""),
    Figure { id: "dirty-all", what: "  of it private and dirty", unit: MiB, goal: None, firecracker: "" },
];

const NATIVE: &[Figure] = &[
    figure("api", "process start → API answers", Ms, 0.8, "1.5"),
    figure("api-cpu", "process start → API answers, CPU time", Ms, 0.5, "1.2"),
    figure("start", "InstanceStart call → reply, tuned kernel", Ms, 2.0, "15"),
    figure("pause", "pause", Ms, 0.2, "0.43"),
    figure("snapshot", "full snapshot, 32 of 128 MiB written", Ms, 14.0, "51"),
    figure("load", "snapshot load with resume → reply", Ms, 1.5, "6.7"),
    figure("shell", "load in a prepared shell → reply", Ms, 0.4, ""),
    figure("reset", "reset in place, nothing written → reply", Ms, 0.5, ""),
    Figure {
        id: "reset-drop", what: "reset in place, 32 MiB written → reply", unit: Ms, goal: None, firecracker: ""
    },
    figure("resident", "resident outside guest RAM", MiB, 2.0, "4.3"),
    figure("dirty", "  of it private and dirty", MiB, 0.3, "0.34"),
    figure("binary", "size of the program", MB, 4.0, ""),
];

/// The figures of a part, in the order they are shown.
pub fn of(part: Part) -> &'static [Figure] {
    match part {
        Part::Deterministic => DETERMINISTIC,
        Part::Native => NATIVE,
    }
}

/// `id`, if there is such a figure.
pub fn known(id: String) -> Result<String, Box<dyn Error>> {
    if DETERMINISTIC.iter().chain(NATIVE).any(|figure| figure.id == id) {
        return Ok(id);
    }
    let all: Vec<_> = DETERMINISTIC.iter().chain(NATIVE).map(|figure| figure.id).collect();
    Err(format!("--only {id:?}: no such figure; there are {}", all.join(", ")).into())
}
