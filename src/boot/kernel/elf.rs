//! ELF kernels (System V ABI, x86-64) and the notes in them.

use std::fs::File;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_DYN, ET_EXEC, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr,
    PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::{Error, KernelInfo, Segment, read_at};

/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// More bytes of notes than any kernel has.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit physical address where PVH enters.
const PVH_ENTRY: u32 = 18;

pub(super) fn inspect(kernel: &File, file_len: u64) -> Result<KernelInfo, Error> {
    let header: Elf64_Ehdr = read(kernel, 0, "ELF header")?;
    let ident = (header.e_ident[EI_CLASS], header.e_ident[EI_DATA]);
    let executable = [ET_EXEC, ET_DYN].contains(&header.e_type);
    if ident != (ELFCLASS64, ELFDATA2LSB) || header.e_machine != EM_X86_64 || !executable {
        return Err(Error::WrongElf);
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(Error::Header { what: "program header size", value: header.e_phentsize.into() });
    }
    if !(1..=MAX_PROGRAM_HEADERS).contains(&header.e_phnum) {
        return Err(Error::Header { what: "number of program headers", value: header.e_phnum.into() });
    }

    let (mut segments, mut notes) = (Vec::new(), Notes::default());
    for index in 0..u64::from(header.e_phnum) {
        let at = header.e_phoff.checked_add(index * size_of::<Elf64_Phdr>() as u64);
        let at = at.ok_or(Error::Header { what: "program header offset", value: header.e_phoff })?;
        let p: Elf64_Phdr = read(kernel, at, "ELF program header")?;
        match p.p_type {
            PT_LOAD => {
                segments.push(Segment { gpa: p.p_paddr, size: p.p_memsz, offset: p.p_offset, file_size: p.p_filesz });
            }
            PT_NOTE => notes.read(kernel, &p)?,
            _ => {}
        }
    }
    let mut info = KernelInfo::new(segments, file_len)?;
    info.linux64 = Some(header.e_entry).filter(|&entry| info.loads(entry));
    info.pvh = notes.pvh.filter(|&entry| info.loads(entry.into()));
    info.is_linux = notes.linux;
    Ok(info)
}

/// What the notes say that matters here.
#[derive(Debug, Default)]
struct Notes {
    pvh: Option<u32>,
    linux: bool,
}

impl Notes {
    fn read(&mut self, kernel: &File, p: &Elf64_Phdr) -> Result<(), Error> {
        if p.p_filesz > MAX_NOTES {
            return Err(Error::Header { what: "size of notes", value: p.p_filesz });
        }
        let mut bytes = vec![0; p.p_filesz as usize];
        read_at(kernel, &mut bytes, p.p_offset, "ELF notes")?;
        // The padding of names and descriptors: 4 bytes, save in the rare segments aligned to 8.
        let align = if p.p_align == 8 { 8 } else { 4 };
        let mut rest = bytes.as_slice();
        while let Some(((kind, name, desc), tail)) = next_note(rest, align) {
            self.note(kind, name, desc);
            rest = tail;
        }
        Ok(())
    }

    fn note(&mut self, kind: u32, name: &[u8], desc: &[u8]) {
        match (name, kind) {
            (b"Linux\0", _) => self.linux = true,
            // Written as a 32-bit or as a pointer-sized number, depending on the kernel's version.
            (b"Xen\0", PVH_ENTRY) => match *desc {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => self.pvh = Some(u32::from_le_bytes([a, b, c, d])),
                _ => {}
            },
            _ => {}
        }
    }
}

/// A note: kind, name, descriptor.
type Note<'a> = (u32, &'a [u8], &'a [u8]);

/// Takes the first note off `bytes`; `None` at the end, or where a length leads out of them.
fn next_note(bytes: &[u8], align: usize) -> Option<(Note<'_>, &[u8])> {
    let mut header = Elf64_Nhdr::default();
    let header_len = size_of::<Elf64_Nhdr>();
    header.as_mut_slice().copy_from_slice(bytes.get(..header_len)?);
    let name_end = header_len.checked_add(header.n_namesz as usize)?;
    let desc_at = name_end.checked_next_multiple_of(align)?;
    let desc_end = desc_at.checked_add(header.n_descsz as usize)?;
    let note = (header.n_type, bytes.get(header_len..name_end)?, bytes.get(desc_at..desc_end)?);
    let rest = bytes.get(desc_end.checked_next_multiple_of(align)?..).unwrap_or_default();
    Some((note, rest))
}

fn read<T: ByteValued + Default>(kernel: &File, offset: u64, what: &'static str) -> Result<T, Error> {
    let mut value = T::default();
    read_at(kernel, value.as_mut_slice(), offset, what)?;
    Ok(value)
}
