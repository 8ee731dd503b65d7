//! The VM and its vCPUs as KVM knows them: with `boot`, the only place that knows the architecture.
//!
//! Only local APICs are KVM's: the I/O APIC is a device of ours, and there is no PIC and no PIT. Those are what makes a
//! VM slow to end and a memory slot slow to add (milliseconds, for grace periods of the host's kernel). The TSS address
//! and the slots come first all the same, then the APICs, and vCPUs last, as KVM documents it.

mod vcpu;
mod vm;
pub mod x86_64;

pub use vcpu::{Exits, Report, Run, Vcpu, Wish, install_kick_handler, pre_fault};
pub use vm::{EmptyVm, Kvm, Vm};

/// A call into KVM that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: load the kvm module and give this user read and write access to it")]
    Open(#[source] kvm_ioctls::Error),
    /// The descriptor that was passed in for it cannot be duplicated.
    #[error("cannot use the descriptor passed in for /dev/kvm")]
    Passed(#[source] std::io::Error),
    /// The kernel's KVM is too old or too odd.
    #[error("this host's KVM lacks {0}, which a microVM needs")]
    Lacks(&'static str),
    /// An ioctl.
    #[error("{call} failed")]
    Ioctl {
        /// Its name.
        call: &'static str,
        /// The errno.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// `KVM_SET_MSRS` stopped early.
    #[error("KVM refused to set MSR {0:#x}")]
    Msr(u32),
    /// A CPUID list or MSR list does not fit.
    #[error("{0} has more entries than KVM accepts")]
    TooMany(&'static str),
    /// A capability that the configuration asks for.
    #[error("kvm_capabilities: this host's KVM lacks capability {0}")]
    Capability(u32),
    /// A change to what is not there.
    #[error("cpuid_modifiers: KVM shows no CPUID leaf {leaf:#x}, subleaf {subleaf:#x} on this host")]
    NoCpuidLeaf {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// The same.
    #[error("msr_modifiers: KVM has no MSR {0:#x} on this host, or does not let it be read")]
    NoMsr(u32),
    /// A descriptor could not be duplicated.
    #[error("cannot duplicate a vCPU's descriptor")]
    Descriptor(#[source] std::io::Error),
    /// A thread could not be started.
    #[error("cannot start the thread of vCPU {0}")]
    Thread(u8, #[source] std::io::Error),
}

/// Names the ioctl in the error.
pub(crate) fn ioctl(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Ioctl { call, source }
}
