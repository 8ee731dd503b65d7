//! Compressed kernels (Linux boot protocol, Documentation/arch/x86/boot.rst).

use std::fs::File;

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::{Error, KernelInfo, Segment, read_at};
use crate::boot::params::{BOOT_FLAG, HEADER_MAGIC, LOADED_HIGH};

/// Offset of `struct setup_header` in the file.
const SETUP_HEADER: u64 = 0x1f1;
/// The header ends where its jump instruction lands: this far after the second byte of `jump`...
const JUMP_BASE: usize = 0x202;
/// ...and at least after `init_size`, the last field needed.
const NEEDED_END: usize = 0x264;
/// The version that brought `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// Bit of `xloadflags`: has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point, from where the protected-mode part is loaded.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

pub(super) fn inspect(kernel: &File, file_len: u64) -> Result<KernelInfo, Error> {
    let header = read_header(kernel, file_len)?;
    if header.version < PROTOCOL_2_12 {
        return Err(Error::OldBzImage { what: "boot protocol 2.12" });
    }
    if header.loadflags & LOADED_HIGH == 0 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::OldBzImage { what: "a 64-bit entry point" });
    }
    // 0 sectors mean 4, for reasons older than the field; the boot sector comes on top.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (sectors + 1) * SECTOR;
    let file_size = file_len.saturating_sub(offset);
    // The part is counted in paragraphs of 16 bytes, the last of which may not be full.
    let promised = u64::from(header.syssize) * 16;
    if file_size == 0 || file_size + 15 < promised {
        return Err(Error::Header { what: "size in paragraphs (the file is shorter)", value: header.syssize.into() });
    }
    let size = u64::from(header.init_size);
    let segment = Segment { gpa: header.pref_address, size, offset, file_size };
    let mut info = KernelInfo::new(vec![segment], file_len)?;
    info.linux64 = header.pref_address.checked_add(ENTRY_64).filter(|&entry| info.loads(entry));
    info.is_linux = true;
    info.setup_header = Some(header);
    Ok(info)
}

/// Reads the setup header up to where the kernel says it ends; fields beyond are zero.
fn read_header(kernel: &File, file_len: u64) -> Result<setup_header, Error> {
    let mut header = setup_header::default();
    if file_len < SETUP_HEADER + size_of::<setup_header>() as u64 {
        return Err(Error::UnknownFormat);
    }
    read_at(kernel, header.as_mut_slice(), SETUP_HEADER, "bzImage setup header")?;
    if header.boot_flag != BOOT_FLAG || header.header != HEADER_MAGIC {
        return Err(Error::UnknownFormat);
    }
    let jump = header.jump;
    let end = JUMP_BASE + usize::from(jump >> 8);
    if end < NEEDED_END {
        return Err(Error::Header { what: "setup header length", value: jump.into() });
    }
    if let Some(beyond) = header.as_mut_slice().get_mut(end - SETUP_HEADER as usize..) {
        beyond.fill(0);
    }
    Ok(header)
}
