//! Vesicle: a virtual machine monitor that gives one untrusted function its own Linux kernel.
//!
//! ```text
//!  launcher ──HTTP/UDS──▶ api thread ──Command──▶ vmm thread ──────▶ vcpu threads (KVM_RUN)
//!                         tokio+hyper             one epoll loop         │ MMIO/PIO exits
//!                                                 owns the Machine       ▼
//!                                                 and all device I/O   Bus → Device (one lock each)
//! ```
//!
//! - `api` parses HTTP and JSON, checks what can be checked without the machine, sends one
//!   [`control::Command`] and waits for one reply.
//! - `vmm` owns the machine and runs the event loop; only it does device I/O and changes the
//!   lifecycle state.
//! - `vcpuN` handles exits; it never blocks on the vmm thread while it holds a device lock.
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`api`] | HTTP and JSON on a Unix socket |
//! | [`control`] | commands, replies and the legal lifecycle transitions |
//! | [`machine`] | the steps of a machine's life and their sequences |
//! | [`event_loop`] | epoll tokens to device calls |
//! | [`boot`] | kernel images, command line, boot parameters, ACPI and MP tables |
//! | [`kvm`] | the VM and its vCPUs: the only architecture-specific place beside `boot` |
//! | [`devices`] | what the guest sees |
//! | [`mmds`] | the metadata service behind the guest's network device |
//! | [`memory`] | guest RAM: layout and backing |
//! | [`snapshot`] | the two files of a snapshot |
//! | [`config`] | the validated configuration and every limit |
//! | [`metrics`], [`log`] | what the operator sees |
//! | [`sandbox`] | system-call filters and Landlock: what each thread gives up |
//! | [`socket`] | Unix sockets in the file system, the API's and vsock's |
//! | [`random`] | bytes nobody can guess |
//! | [`os`] | what system calls return |
//! | `heap` | libc's functions for memory, where libc is musl |
//! | [`signals`] | how the process ends when somebody else wants it to |
//!
//! Dependencies point one way: `main → cli → api → control → machine → {boot, kvm, devices, sandbox, snapshot} →
//! {memory, mmds} → crates`; `config`, `metrics` and `log` import nothing of ours. A test keeps this true.

// A fuzzer is built without the tests, but with what they use.
#![cfg_attr(fuzzing, allow(dead_code, unused_imports, unused_macros))]
// Clippy knows what is for tests by `cfg(test)` alone; it looks at all that is not without them, too.
#![cfg_attr(any(test, fuzzing), allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod api;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
pub mod event_loop;
#[cfg(fuzzing)]
pub mod fuzzing;
#[cfg(any(test, fuzzing))]
mod generated;
#[cfg(target_env = "musl")]
mod heap;
pub mod kvm;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod os;
pub mod random;
pub mod sandbox;
pub mod signals;
pub mod snapshot;
pub mod socket;
