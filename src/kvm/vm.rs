//! The VM: memory slots, interrupt controllers, event descriptors.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};

use io_uring::IoUring;
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    kvm_clock_data, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::x86_64::msrs;
use super::{Error, ioctl};
use crate::config::Capability;
use crate::memory::{self, GuestRam, Slot};
use crate::os::checked;

/// `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm`, or takes a descriptor of it that was passed in.
    fn open(passed: Option<&OwnedFd>) -> Result<Self, Error> {
        let fd = match passed {
            // SAFETY: the descriptor was just made, for this alone.
            Some(fd) => unsafe { kvm_ioctls::Kvm::from_raw_fd(fd.try_clone().map_err(Error::Passed)?.into_raw_fd()) },
            None => kvm_ioctls::Kvm::new().map_err(Error::Open)?,
        };
        if fd.get_api_version() != 12 {
            return Err(Error::Lacks("API version 12"));
        }
        Ok(Self { fd })
    }

    /// Checks what it must be able to do, changed by `changes`.
    fn check(&self, changes: &[Capability]) -> Result<(), Error> {
        for (cap, name) in [
            (Cap::SplitIrqchip, "local APICs without an I/O APIC (KVM_CAP_SPLIT_IRQCHIP)"),
            (Cap::SignalMsi, "KVM_SIGNAL_MSI"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::UserMemory, "user memory regions"),
            (Cap::ReadonlyMem, "read-only memory slots"),
            (Cap::SetTssAddr, "KVM_SET_TSS_ADDR"),
            (Cap::ImmediateExit, "immediate_exit"),
        ] {
            if !changes.contains(&Capability::Waived(cap as u32)) && !self.fd.check_extension(cap) {
                return Err(Error::Lacks(name));
            }
        }
        for change in changes {
            if let Capability::Required(number) = *change
                && self.fd.check_extension_raw(number.into()) <= 0
            {
                return Err(Error::Capability(number));
            }
        }
        Ok(())
    }

    /// The leaves KVM can show a guest on this host. It takes a quarter of a millisecond to ask.
    pub fn supported_cpuid(&self) -> Result<CpuId, Error> {
        self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))
    }

    /// The MSRs that make up a vCPU's state on this host: those that KVM lists, and those of the memory types.
    pub fn msrs(&self) -> Result<Vec<u32>, Error> {
        let list = self.fd.get_msr_index_list().map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().iter().copied().chain(msrs::memory_types()).collect())
    }
}

/// A VM with nothing in it: what can be made before it is known for what.
pub struct EmptyVm {
    kvm: Kvm,
    fd: VmFd,
}

impl EmptyVm {
    /// Makes it with `/dev/kvm`, or a descriptor of that which was passed in.
    ///
    /// # Errors
    /// There is no KVM for this user.
    pub fn new(kvm: Option<&OwnedFd>) -> Result<Self, Error> {
        let kvm = Kvm::open(kvm)?;
        let fd = kvm.fd.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        Ok(Self { kvm, fd })
    }
}

/// A VM without vCPUs.
pub struct Vm {
    fd: VmFd,
}

impl Vm {
    /// Gives a VM `ram`, memory it can only read, and local APICs. KVM has to be able to do what `changes` say. With
    /// `log_dirty` it notes which pages of `ram` the guest writes.
    ///
    /// # Safety
    /// What `read_only` names is mapped as long as the VM lives, and `ram` outlives the VM.
    pub unsafe fn new(
        EmptyVm { kvm, fd }: EmptyVm,
        changes: &[Capability],
        ram: &GuestRam,
        log_dirty: bool,
        read_only: Option<Slot>,
    ) -> Result<(Kvm, Self), Error> {
        kvm.check(changes)?;
        fd.set_identity_map_address(memory::KVM_IDENTITY_MAP).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(memory::KVM_TSS as usize).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        let ram_flags = if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let slots = ram.slots().map(|slot| (slot, ram_flags)).chain(read_only.map(|slot| (slot, KVM_MEM_READONLY)));
        for (index, (slot, flags)) in (0..).zip(slots) {
            let region = kvm_userspace_memory_region {
                slot: index,
                flags,
                guest_phys_addr: slot.gpa,
                memory_size: slot.size,
                userspace_addr: slot.host,
            };
            // SAFETY: the range is mapped as long as the VM lives, by this function's contract.
            unsafe { fd.set_user_memory_region(region) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        // KVM reserves no interrupt numbers for an I/O APIC: it would need to know of those that are acknowledged.
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        fd.enable_cap(&split).map_err(ioctl("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
        Ok((kvm, Self { fd }))
    }

    /// A ring that holds the VM's file and can do nothing else: it is never enabled. The kernel takes a
    /// VM apart when the last reference to its file goes, and waits out several grace periods for it (11 ms
    /// measured), which otherwise whoever waits for this process waits out as well; a ring's references
    /// are given up on a kernel thread.
    ///
    /// # Errors
    /// The host allows no rings.
    pub fn undertaker(&self) -> io::Result<IoUring> {
        undertaker(self.fd.as_raw_fd())
    }

    /// Makes the descriptor of vCPU `id`.
    pub fn create_vcpu(&self, id: u8) -> Result<kvm_ioctls::VcpuFd, Error> {
        self.fd.create_vcpu(u64::from(id)).map_err(ioctl("KVM_CREATE_VCPU"))
    }

    /// A second handle of the vCPU whose descriptor is `vcpu`, to look at it while it is parked.
    ///
    /// # Errors
    /// There is no descriptor left, or no address space.
    ///
    /// # Safety
    /// `vcpu` is the open descriptor of a vCPU of this VM.
    pub unsafe fn second_handle(&self, vcpu: RawFd) -> Result<VcpuFd, Error> {
        // SAFETY: `fcntl` only looks the number up.
        let copy = unsafe { libc::fcntl(vcpu, libc::F_DUPFD_CLOEXEC, 3) };
        checked(copy).map_err(Error::Descriptor)?;
        // SAFETY: the descriptor is new, nobody else's, and by this function's contract a vCPU's.
        unsafe { self.fd.create_vcpu_from_rawfd(copy) }.map_err(ioctl("mmap of a vCPU"))
    }

    /// Which pages of slot `index`, `size` bytes long, the guest wrote since the last call, a bit each.
    pub fn take_dirty_log(&self, index: u32, size: u64) -> Result<Vec<u64>, Error> {
        self.fd.get_dirty_log(index, size as usize).map_err(ioctl("KVM_GET_DIRTY_LOG"))
    }

    /// Reads the guest's clock while no vCPU runs, and the time of day.
    pub fn clock(&self) -> Result<kvm_clock_data, Error> {
        let mut clock = self.fd.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?;
        if clock.flags & KVM_CLOCK_REALTIME == 0 {
            // KVM says both at once only where the host's own clock is the TSC.
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            clock.realtime = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            clock.flags |= KVM_CLOCK_REALTIME;
        }
        Ok(clock)
    }

    /// Has the guest's clock go on from where it stood; with `realtime` it jumps ahead by the time that went by outside.
    pub fn set_clock(&self, mut clock: kvm_clock_data, realtime: bool) -> Result<(), Error> {
        clock.flags &= if realtime { KVM_CLOCK_REALTIME } else { 0 };
        self.fd.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))
    }

    /// A guest write of any width and value at `gpa` signals `event`, without an exit to us.
    pub fn register_ioeventfd(&self, event: &EventFd, gpa: u64) -> Result<(), Error> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch).map_err(ioctl("KVM_IOEVENTFD"))
    }

    /// A guest write of the 32-bit `value` at `gpa` signals `event` and does nothing else.
    pub fn swallow(&self, event: &EventFd, gpa: u64, value: u32) -> Result<(), Error> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(gpa), value).map_err(ioctl("KVM_IOEVENTFD"))
    }

    /// Has the local APICs take a message: an interrupt for one of them, or several.
    pub fn signal(&self, address: u32, data: u32) {
        // It fails only where the guest has it go to nobody.
        let _ = self.fd.signal_msi(kvm_msi { address_lo: address, data, ..Default::default() });
    }
}

fn undertaker(file: RawFd) -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(1)?;
    ring.submitter().register_files(&[file])?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The filters let a thread enter any ring there is, and do not see what it asks for.
    #[test]
    fn the_ring_that_holds_the_vm_takes_no_requests() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let Ok(mut ring) = undertaker(file.as_raw_fd()) else { return eprintln!("SKIPPED: the host allows no rings") };
        // SAFETY: the operation has no arguments.
        unsafe { ring.submission().push(&io_uring::opcode::Nop::new().build()) }.unwrap();
        assert_eq!(ring.submit().unwrap_err().raw_os_error(), Some(libc::EBADFD));
    }
}
