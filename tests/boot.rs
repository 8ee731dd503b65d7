//! Linux guests that boot, and every way in which they end.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::{Guest, MicroVm, PATIENCE, Place, artefact, has_debian_6_1, wait_until};
use serde_json::json;
use vesicle::memory::BOOT_TIMER;

/// Boots to a shell that runs where it should, and ends cleanly.
fn boots(guest: Guest, release: &str, root: &str) {
    let mut vm = guest.boot();
    let found = vm.ok("uname -r");
    assert!(found.starts_with(release), "{found}");
    assert_eq!(vm.ok("awk '$2 == \"/\" { print $3 }' /proc/mounts | tail -n 1"), root);
    vm.shut_down();
}

/// With the default guest in memory only, then with its root on a drive.
fn boots_both_ways(guest: impl Fn() -> Guest, release: &str) {
    boots(guest(), release, "rootfs");
    boots(guest().rootfs(), release, "ext4");
}

#[test]
fn debian_6_12_boots_from_its_bzimage() {
    boots_both_ways(|| Guest::debian("6.12"), "6.12.");
}

#[test]
fn debian_6_1_boots_from_its_bzimage() {
    if has_debian_6_1() {
        boots_both_ways(|| Guest::debian("6.1"), "6.1.");
    }
}

/// The tuned kernel finds its root drive by itself, so nothing but the kernel is needed.
fn tuned_boots(guest: impl Fn() -> Guest) {
    boots(guest(), "6.12.", "rootfs");
    boots(guest().no_initramfs().rootfs(), "6.12.", "ext4");
}

#[test]
fn the_tuned_kernel_boots_through_its_64_bit_entry() {
    tuned_boots(Guest::tuned);
}

#[test]
fn the_tuned_kernel_boots_without_acpi() {
    tuned_boots(|| Guest::tuned().boot_args("acpi=off"));
}

/// The tuned kernel with PVH as the only entry that is left, and where it lives.
fn pvh_kernel() -> (Place, PathBuf) {
    let dir = common::tempdir();
    let kernel = dir.path().join("vmlinux");
    fs::copy(artefact("kernel-tuned"), &kernel).unwrap();
    // e_entry, the 64-bit entry point, is at offset 24 of an ELF header.
    fs::File::options().write(true).open(&kernel).unwrap().write_all_at(&[0; 8], 24).unwrap();
    (dir, kernel)
}

#[test]
fn the_tuned_kernel_boots_through_its_pvh_entry() {
    let (_dir, kernel) = pvh_kernel();
    tuned_boots(|| Guest::tuned().kernel(&kernel));
}

#[test]
fn the_tuned_kernel_boots_through_its_pvh_entry_without_acpi() {
    let (_dir, kernel) = pvh_kernel();
    tuned_boots(|| Guest::tuned().kernel(&kernel).boot_args("acpi=off"));
}

#[test]
fn a_kernel_entered_through_pvh_knows_it() {
    let (_dir, kernel) = pvh_kernel();
    let mut vm = Guest::tuned().kernel(&kernel).boot();
    // Linux notes type 0xb for a PVH loader other than Xen.
    assert_eq!(vm.ok("cat /proc/sys/kernel/bootloader_type"), 0xb0.to_string());
    vm.shut_down();
}

fn shows_its_vcpus(guest: impl Fn() -> Guest) {
    for vcpus in [1, 2, 4] {
        let mut vm = guest().vcpus(vcpus).boot();
        assert_eq!(vm.ok("nproc"), vcpus.to_string());
        // They all work, and interrupts reach them.
        vm.ok("for cpu in $(seq 0 $(($(nproc) - 1))); do taskset $((1 << cpu)) sleep 0.01 || exit; done");
        vm.shut_down();
    }
}

#[test]
fn a_guest_with_acpi_shows_its_vcpus() {
    shows_its_vcpus(|| Guest::debian("6.12"));
}

#[test]
fn a_guest_without_acpi_shows_its_vcpus() {
    shows_its_vcpus(|| Guest::tuned().boot_args("acpi=off"));
}

#[test]
fn memory_goes_on_above_the_gap_below_4_gib() {
    let mut vm = Guest::tuned().memory(5 << 10).boot();
    let kib: u64 = vm.ok("awk '/^MemTotal/ { print $2 }' /proc/meminfo").parse().unwrap();
    // The kernel keeps a sixty-fourth for its page descriptors, and itself.
    assert!((4900 << 10..=5 << 20).contains(&kib), "{kib} KiB");
    vm.shut_down();
}

#[test]
fn a_job_hands_back_its_output_and_its_exit_status() {
    for guest in [Guest::debian("6.12"), Guest::tuned().no_initramfs().rootfs()] {
        // Enough that some of it is still on its way when the job ends.
        let mut vm = guest.job("seq 300; exit 42").start();
        assert_eq!(vm.wait_job(), Some(42));
        assert_eq!(vm.output(), (1..=300).map(|n| format!("{n}\n")).collect::<String>());
    }
}

#[test]
fn a_reset_a_panic_and_a_triple_fault_all_end_the_vmm_cleanly() {
    let mut vm = Guest::tuned().no_job().boot_args("vesicle.init=reboot").start();
    assert_eq!(vm.wait_exit().code(), Some(0));

    let mut vm = Guest::debian("6.12").boot();
    vm.begin("echo c >/proc/sysrq-trigger");
    vm.wait_for_line("Kernel panic", PATIENCE);
    assert_eq!(vm.wait_exit().code(), Some(0));

    let mut vm = Guest::tuned().no_job().boot_args("reboot=t vesicle.init=reboot").start();
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn a_kernel_without_a_root_panics_and_the_vmm_ends() {
    let mut vm = Guest::tuned().no_initramfs().no_job().start();
    vm.wait_for_line("Unable to mount root fs", PATIENCE);
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn sigterm_and_sigint_end_the_vmm_at_every_stage() {
    for end in [MicroVm::terminate, MicroVm::interrupt] {
        let mut vm = Guest::tuned().configure();
        end(&vm);
        assert_eq!(vm.wait_exit().code(), Some(0));
    }

    let mut vm = Guest::tuned().vcpus(2).boot();
    vm.begin("while :; do :; done");
    vm.interrupt();
    assert_eq!(vm.wait_exit().code(), Some(0));

    let mut vm = Guest::tuned().boot();
    vm.pause();
    vm.terminate();
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn ctrl_alt_del_restarts_the_guest_and_so_ends_the_vmm() {
    for guest in [Guest::debian("6.12"), Guest::tuned()] {
        let mut vm = guest.boot();
        vm.action("SendCtrlAltDel");
        assert_eq!(vm.wait_exit().code(), Some(0));
    }
}

#[test]
fn the_boot_timer_tells_when_the_guest_is_up_and_only_once() {
    let mut vm = Guest::tuned().argument("--boot-timer").boot();
    let ring = format!("devmem {BOOT_TIMER:#x} 8 123");
    vm.ok(&ring);
    vm.ok(&ring);
    let times: Vec<_> = vm.log().lines().filter(|line| line.contains("Guest-boot-time")).map(str::to_owned).collect();
    assert_eq!(times.len(), 1, "{times:?}");
    vm.shut_down();
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_when_resumed() {
    let mut vm = Guest::tuned().vcpus(2).boot();
    vm.pause();
    vm.pause();
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.begin("echo alive");
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(!vm.output().contains("alive"));
    vm.resume();
    vm.resume();
    assert_eq!(vm.finish(PATIENCE), ("alive\n".to_owned(), 0));
    assert_eq!(vm.get("/")["state"], "Running");
    vm.shut_down();
}

/// InstanceStart must be refused; returns why.
fn refused_start(vm: &MicroVm) -> String {
    vm.refused_put("/actions", &json!({ "action_type": "InstanceStart" }))
}

#[test]
fn too_little_memory_is_refused_with_the_figure_that_would_do() {
    let mut vm = Guest::tuned().memory(8).configure();
    let fault = refused_start(&vm);
    let needed = fault.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).expect(&fault);
    let needed: u64 = needed.parse().expect(&fault);
    vm.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": needed - 1 }));
    assert_eq!(vm.get("/")["state"], "Not started");
    assert!(refused_start(&vm).contains(&format!("at least {needed} MiB")));

    // That much is enough to load it, and some more to boot.
    vm.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": needed + 32 }));
    vm.start();
    vm.wait_until_ready();
    vm.shut_down();
}

#[test]
fn what_is_no_kernel_is_refused_and_the_next_one_boots() {
    let mut vm = Guest::tuned().configure();
    let garbage = vm.dir().join("garbage");
    let mut truncated = fs::read(artefact("kernel-tuned")).unwrap();
    truncated.truncate(4096);
    for content in [&b""[..], b"garbage", &[0; 8192], b"\x7fELF", &truncated] {
        fs::write(&garbage, content).unwrap();
        let fault = vm.refused_put("/boot-source", &json!({ "kernel_image_path": garbage }));
        assert!(fault.contains("kernel"), "{fault}");
    }
    for path in ["/nonexistent", "/", "/dev/null"] {
        let fault = vm.refused_put("/boot-source", &json!({ "kernel_image_path": path }));
        assert!(fault.contains(path), "{fault}");
    }
    // A refusal changes nothing: the kernel from before boots.
    vm.start();
    vm.wait_until_ready();
    vm.shut_down();
}

#[test]
fn a_process_that_waits_makes_its_vm_ahead_and_has_no_other() {
    let mut vm = Guest::tuned().configure();
    let pid = vm.pid();
    let vms = || {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let names = files.filter_map(|file| fs::read_link(file.unwrap().path()).ok());
        names.filter(|name| name.as_os_str() == "anon_inode:kvm-vm").count()
    };
    wait_until(|| vms() == 1);
    vm.start();
    vm.wait_until_ready();
    assert_eq!(vms(), 1);
    assert_eq!(vm.ok("echo up"), "up");
    vm.shut_down();
}
