//! CPUID as the guest sees it (Intel SDM vol. 2A "CPUID", AMD APM vol. 3 appendix E).
//!
//! KVM reports what it can emulate on this host, with the host's topology in it. [`Topology`]
//! replaces every leaf that speaks of packages, cores, threads, caches or this very CPU, so that a
//! guest sees one socket with its own vCPUs whatever host CPU the process happened to ask on.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::{CpuidModifier, CpuidRegister};
use crate::kvm::Error;

const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const LEAF_6_EAX_TURBO: u32 = 1 << 1;
const LEAF_6_ECX_ENERGY_BIAS: u32 = 1 << 3;
const LEAF_80000001_ECX_CMP_LEGACY: u32 = 1 << 1;
const LEAF_80000001_ECX_SVM: u32 = 1 << 2;
const LEAF_80000001_ECX_TOPOLOGY: u32 = 1 << 22;
/// `CLFLUSH` line size in units of 8 bytes.
const CLFLUSH_64: u32 = 8 << 8;
const BRAND: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// The maker of the host CPU, as far as it decides which leaves mean what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
    Other,
}

/// How many vCPUs there are and how they share cores: one socket, APIC ids without holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// All vCPUs.
    pub vcpus: u8,
    /// 1, or 2 with SMT.
    pub threads_per_core: u8,
}

impl Topology {
    fn cores(self) -> u32 {
        u32::from(self.vcpus).div_ceil(u32::from(self.threads_per_core))
    }

    /// Low bits of an APIC id that number the thread in its core.
    fn thread_bits(self) -> u32 {
        bits_for(u32::from(self.threads_per_core))
    }

    /// Low bits of an APIC id that number the thread in its package.
    fn package_bits(self) -> u32 {
        self.thread_bits() + bits_for(self.cores())
    }
}

/// Bits to number `count` things.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// The CPUID leaves of vCPU `apic_id`, from what KVM supports.
pub fn for_vcpu(supported: &CpuId, topology: Topology, apic_id: u8) -> Result<CpuId, Error> {
    let vendor = vendor(supported.as_slice());
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        normalise(entry, vendor, topology, u32::from(apic_id));
    }
    for function in [0xb, 0x1f] {
        if supported.as_slice().iter().any(|e| e.function == function) {
            entries.extend(extended_topology(function, topology, u32::from(apic_id)));
        }
    }
    set_brand(&mut entries, vendor);
    CpuId::from_entries(&entries).map_err(|_| Error::TooMany("the CPUID list"))
}

/// Changes what the guest sees.
///
/// # Errors
/// A leaf that is not there.
pub fn modify(cpuid: &mut CpuId, modifiers: &[CpuidModifier]) -> Result<(), Error> {
    for &CpuidModifier { leaf, subleaf, flags, ref registers } in modifiers {
        let mut entries = cpuid.as_mut_slice().iter_mut();
        let entry = entries
            .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
            .ok_or(Error::NoCpuidLeaf { leaf, subleaf })?;
        entry.flags = flags;
        for (register, bitmap) in registers {
            let register = match register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            // The bit map is one of 32 bits.
            *register = bitmap.apply((*register).into()) as u32;
        }
    }
    Ok(())
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Vendor {
    let Some(leaf_0) = entries.iter().find(|e| e.function == 0) else { return Vendor::Other };
    let name = [leaf_0.ebx, leaf_0.edx, leaf_0.ecx].map(u32::to_le_bytes).concat();
    match name.as_slice() {
        b"GenuineIntel" => Vendor::Intel,
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        _ => Vendor::Other,
    }
}

fn normalise(entry: &mut kvm_cpuid_entry2, vendor: Vendor, topology: Topology, apic_id: u32) {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        1 => {
            // No guests of the guest's: their state would be in no snapshot, and outlive a reset.
            entry.ecx &= !LEAF_1_ECX_VMX;
            let logical = 1u32 << topology.package_bits();
            entry.ebx = entry.ebx & 0xff | CLFLUSH_64 | logical.min(255) << 16 | apic_id << 24;
            entry.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_TSC_DEADLINE;
            entry.edx = set_if(entry.edx, LEAF_1_EDX_HTT, vcpus > 1);
        }
        4 if vendor == Vendor::Intel && entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            entry.eax = entry.eax & 0x3fff | (sharing(level, topology) - 1) << 14 | (id_space(topology) - 1) << 26;
        }
        // No turbo and no energy hints: their MSRs do not exist here.
        6 => {
            entry.eax &= !LEAF_6_EAX_TURBO;
            entry.ecx &= !LEAF_6_ECX_ENERGY_BIAS;
        }
        // No performance counters: what they count is the host's business.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 if vendor == Vendor::Amd => {
            entry.ecx &= !LEAF_80000001_ECX_SVM;
            entry.ecx = set_if(entry.ecx, LEAF_80000001_ECX_CMP_LEGACY, vcpus > 1) | LEAF_80000001_ECX_TOPOLOGY;
        }
        0x8000_0008 if vendor == Vendor::Amd => {
            entry.ecx = entry.ecx & !0xf0ff | topology.package_bits() << 12 | (vcpus - 1);
        }
        0x8000_001d if vendor == Vendor::Amd && entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            entry.eax = entry.eax & 0x3fff | (sharing(level, topology) - 1) << 14;
        }
        0x8000_001e if vendor == Vendor::Amd => {
            let threads = u32::from(topology.threads_per_core);
            entry.eax = apic_id;
            entry.ebx = apic_id >> topology.thread_bits() | (threads - 1) << 8;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn set_if(word: u32, bit: u32, condition: bool) -> u32 {
    if condition { word | bit } else { word & !bit }
}

/// vCPUs that share a cache: the core's threads up to level 2, the whole package from level 3.
fn sharing(level: u32, topology: Topology) -> u32 {
    if level < 3 { u32::from(topology.threads_per_core) } else { u32::from(topology.vcpus) }
}

/// Ids of cores in a package, as leaf 4 wants them: a power of two.
fn id_space(topology: Topology) -> u32 {
    1 << (topology.package_bits() - topology.thread_bits())
}

/// The leaves that enumerate topology level by level, for CPUs that have them.
fn extended_topology(function: u32, topology: Topology, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
    let threads = u32::from(topology.threads_per_core);
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, 1, topology.thread_bits(), threads),
        level(1, 2, topology.package_bits(), u32::from(topology.vcpus)),
        level(2, 0, 0, 0),
    ]
}

/// A brand string that names the maker and nothing else of the host.
fn set_brand(entries: &mut [kvm_cpuid_entry2], vendor: Vendor) {
    let brand: &[u8] = match vendor {
        Vendor::Intel => b"Intel(R) Xeon(R) Processor",
        Vendor::Amd => b"AMD EPYC",
        Vendor::Other => return,
    };
    let mut text = [0u8; 48];
    text[..brand.len()].copy_from_slice(brand);
    for entry in entries.iter_mut().filter(|e| BRAND.contains(&e.function)) {
        let at = (entry.function - BRAND.start()) as usize * 4;
        let word = |i: usize| u32::from_le_bytes(text.as_chunks().0[at + i]);
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BitMap;

    /// A leaf as one line of a recording: function, index, eax, ebx, ecx, edx.
    type Row = (u32, u32, u32, u32, u32, u32);

    /// What KVM reported on a 2-thread-per-core Intel server, the leaves that matter.
    const INTEL: &[Row] = &[
        (0x0, 0, 0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
        (0x1, 0, 0x0008_06f8, 0x0640_0800, 0x7ffa_fbbf, 0xbfab_fbff),
        (0x4, 0, 0xfc00_4121, 0x02c0_003f, 0x3f, 0),
        (0x4, 1, 0xfc00_4122, 0x01c0_003f, 0x3f, 0),
        (0x4, 2, 0xfc00_4143, 0x03c0_003f, 0x7ff, 0),
        (0x4, 3, 0xfc1f_c163, 0x0380_003f, 0x1_bfff, 4),
        (0x6, 0, 0x4f, 2, 0x9, 0),
        (0xa, 0, 0x0830_0805, 0, 0xf, 0x8604),
        (0xb, 0, 1, 2, 0x100, 6),
        (0xb, 1, 7, 96, 0x201, 6),
        (0x1f, 0, 1, 2, 0x100, 6),
        (0x8000_0002, 0, 0x6f68_7465, 0, 0, 0),
        (0x8000_0003, 0, 1, 1, 1, 1),
        (0x8000_0004, 0, 1, 1, 1, 1),
        (0x8000_0008, 0, 0x3934, 0x200, 0, 0),
    ];

    /// The same of an AMD server.
    const AMD: &[Row] = &[
        (0x0, 0, 0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
        (0x1, 0, 0x00a0_0f11, 0x0540_0800, 0x7ef8_320b, 0x178b_fbff),
        (0xb, 0, 1, 2, 0x100, 5),
        (0x8000_0001, 0, 0x00a0_0f11, 0x4000_0000, 0x75c2_37ff, 0x2fd3_fbff),
        (0x8000_0002, 0, 0x2044_4d41, 0, 0, 0),
        (0x8000_0008, 0, 0x3030, 0x0111_ed57, 0x0001_707f, 0),
        (0x8000_001d, 0, 0x0000_4121, 0x01c0_003f, 0x3f, 0),
        (0x8000_001d, 3, 0x0003_c163, 0x03c0_003f, 0x7fff, 1),
        (0x8000_001e, 0, 5, 0x0102, 0x0100, 0),
    ];

    fn record(rows: &[Row]) -> CpuId {
        let entries: Vec<_> = rows
            .iter()
            .map(|&(function, index, eax, ebx, ecx, edx)| kvm_cpuid_entry2 {
                function,
                index,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            })
            .collect();
        CpuId::from_entries(&entries).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn apic_id_is_the_vcpus_own_in_every_leaf_that_tells_it() {
        let topology = Topology { vcpus: 4, threads_per_core: 1 };
        let intel = for_vcpu(&record(INTEL), topology, 3).unwrap();
        assert_eq!(leaf(&intel, 1, 0).ebx >> 24, 3);
        assert_eq!([leaf(&intel, 0xb, 0).edx, leaf(&intel, 0xb, 1).edx, leaf(&intel, 0x1f, 1).edx], [3, 3, 3]);
        let amd = for_vcpu(&record(AMD), topology, 2).unwrap();
        assert_eq!([leaf(&amd, 1, 0).ebx >> 24, leaf(&amd, 0xb, 0).edx, leaf(&amd, 0x8000_001e, 0).eax], [2, 2, 2]);
    }

    #[test]
    fn one_vcpu_is_one_core_without_threads() {
        let cpuid = for_vcpu(&record(INTEL), Topology { vcpus: 1, threads_per_core: 1 }, 0).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).edx & LEAF_1_EDX_HTT, 0);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16 & 0xff, 1);
        assert_eq!(leaf(&cpuid, 4, 3).eax >> 14, 0, "nobody to share the last cache with");
        assert_eq!((leaf(&cpuid, 0xb, 0).eax, leaf(&cpuid, 0xb, 1).eax), (0, 0));
    }

    #[test]
    fn smt_pairs_share_the_first_caches_and_all_share_the_last() {
        let cpuid = for_vcpu(&record(INTEL), Topology { vcpus: 4, threads_per_core: 2 }, 1).unwrap();
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 14 & 0xfff, 1);
        assert_eq!(leaf(&cpuid, 4, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 1, "two cores in the package");
        assert_eq!((leaf(&cpuid, 0xb, 0).eax, leaf(&cpuid, 0xb, 1).eax), (1, 2));
        assert_eq!((leaf(&cpuid, 0xb, 0).ebx, leaf(&cpuid, 0xb, 1).ebx), (2, 4));
        let amd = for_vcpu(&record(AMD), Topology { vcpus: 4, threads_per_core: 2 }, 3).unwrap();
        assert_eq!(leaf(&amd, 0x8000_001e, 0).ebx, 1 | 1 << 8);
        assert_eq!(leaf(&amd, 0x8000_001d, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(leaf(&amd, 0x8000_0008, 0).ecx & 0xff, 3);
    }

    #[test]
    fn odd_counts_and_the_most_vcpus_number_without_overflow() {
        for vcpus in 1..=crate::config::MAX_VCPUS {
            let topology = Topology { vcpus, threads_per_core: 1 };
            for rows in [INTEL, AMD] {
                let cpuid = for_vcpu(&record(rows), topology, vcpus - 1).unwrap();
                assert!(leaf(&cpuid, 1, 0).ebx >> 16 & 0xff >= u32::from(vcpus));
                assert_eq!(leaf(&cpuid, 0xb, 1).ebx, u32::from(vcpus));
            }
        }
    }

    #[test]
    fn a_modifier_has_the_last_word_and_one_for_a_missing_leaf_is_refused() {
        let change = |leaf, subleaf, bitmap: &str| CpuidModifier {
            leaf,
            subleaf,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            registers: vec![
                (CpuidRegister::Eax, BitMap::parse(bitmap, 32).unwrap()),
                (CpuidRegister::Edx, BitMap::parse("0b1", 32).unwrap()),
            ],
        };
        let before = for_vcpu(&record(INTEL), Topology { vcpus: 1, threads_per_core: 1 }, 0).unwrap();
        let mut cpuid = before.clone();
        modify(&mut cpuid, &[change(4, 2, "0b0xxx1"), change(1, 0, "0bx")]).unwrap();
        let (old, new) = (leaf(&before, 4, 2), leaf(&cpuid, 4, 2));
        assert_eq!((new.eax, new.edx), (old.eax & !0x10 | 1, old.edx | 1));
        assert_eq!((new.ebx, new.ecx, new.flags), (old.ebx, old.ecx, KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
        assert_eq!((leaf(&cpuid, 4, 1), leaf(&cpuid, 1, 0).eax), (leaf(&before, 4, 1), leaf(&before, 1, 0).eax));
        let error = modify(&mut cpuid, &[change(0x77, 3, "0b1")]).unwrap_err().to_string();
        assert_eq!(error, "cpuid_modifiers: KVM shows no CPUID leaf 0x77, subleaf 0x3 on this host");
    }

    #[test]
    fn the_guest_sees_a_hypervisor_and_no_model_name_counters_or_turbo() {
        let cpuid = for_vcpu(&record(INTEL), Topology { vcpus: 1, threads_per_core: 1 }, 0).unwrap();
        assert_ne!(leaf(&cpuid, 1, 0).ecx & LEAF_1_ECX_HYPERVISOR, 0);
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
        assert_ne!(leaf(&record(INTEL), 1, 0).ecx & LEAF_1_ECX_VMX, 0);
        assert_eq!(leaf(&cpuid, 1, 0).ecx & LEAF_1_ECX_VMX, 0);
        assert_eq!(leaf(&cpuid, 6, 0).eax & LEAF_6_EAX_TURBO, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0002, 0).eax.to_le_bytes(), *b"Inte");
        assert_eq!(leaf(&cpuid, 0x8000_0004, 0).edx, 0);
    }
}
