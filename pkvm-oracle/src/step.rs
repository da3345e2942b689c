//! The steps, as types and as text.

use std::fmt;
use std::str::FromStr;

use crate::name::{Ipa, Name, Pages, Place, VcpuName};
use crate::words::{Words, number};

/// Pages in 2 MiB.
pub const HUGE_PAGES: u64 = 512;

/// A memory of more pages is a slip of the pen.
pub const MEMORY_PAGES_MAX: u64 = 4096;

/// Where the guest's program is, in every VM: a page of shared anonymous memory that the first vCPU
/// brings. A protected guest has it from its first KVM_RUN on, and it is charged.
pub const PROGRAM: Ipa = Ipa(0x1000_0000);
/// The memslot of that page.
pub const PROGRAM_SLOT: u16 = 500;
/// Where the guest reads commands and writes answers. No slot covers it.
pub const COMMAND: Ipa = Ipa(0x0900_0000);
/// The hypercall of [`GuestAct::Share`].
pub const MEM_SHARE: u64 = 0xc600_0003;
/// The hypercall of [`GuestAct::Unshare`].
pub const MEM_UNSHARE: u64 = 0xc600_0004;

/// What a memory is made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous.
    Anon,
    /// Shared anonymous.
    Shared,
    /// A memfd, mapped shared.
    Memfd,
    /// A memfd of hugetlb pages of 2 MiB, mapped shared. Whole ones only.
    Hugetlb,
    /// KVM's guest_memfd of this VM, made with MMAP and INIT_SHARED, mapped shared.
    GuestMemfd(Name),
}

/// Whether 2 MiB pages are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Size {
    /// Pages of 4 KiB: MADV_NOHUGEPAGE.
    Small,
    /// Aligned to 2 MiB, MADV_HUGEPAGE, and touched.
    Huge,
}

/// The type of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmKind {
    /// Its memory is its own.
    Protected,
    /// The host keeps its view of it.
    Plain,
}

/// Flags of a memslot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotFlags {
    /// KVM_MEM_READONLY.
    pub readonly: bool,
    /// KVM_MEM_LOG_DIRTY_PAGES.
    pub log: bool,
}

/// What a guest is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestAct {
    /// Loads a byte.
    Load(Ipa),
    /// Stores a byte.
    Store(Ipa, u8),
    /// Branches there, and expects to come back.
    Execute(Ipa),
    /// MEM_SHARE.
    Share(Ipa),
    /// MEM_UNSHARE.
    Unshare(Ipa),
    /// `hvc #0` with x0 to x3.
    Hvc([u64; 4]),
    /// Nothing new: what it was at when KVM_RUN ended early.
    Resume,
}

/// How the host reaches for a byte of a memory, or what it does to the byte's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostAct {
    /// A load instruction.
    Load,
    /// A store instruction.
    Store(u8),
    /// write(2) to a pipe; shows what arrived.
    Write,
    /// read(2) from a pipe.
    Read(u8),
    /// process_vm_readv of itself.
    VmRead,
    /// process_vm_writev of itself.
    VmWrite(u8),
    /// pread of /proc/self/mem.
    MemRead,
    /// pwrite of /proc/self/mem.
    MemWrite(u8),
    /// vmsplice into a pipe, and read(2) from it.
    Splice,
    /// vmsplice into a pipe that nobody reads: the page is pinned for a while, and not accessed.
    Pin,
    /// pread of the memory's file.
    FileRead,
    /// pwrite of the memory's file.
    FileWrite(u8),
    /// sendfile(2) of the memory's file into a pipe, and read(2) from it.
    SendFile,
    /// A device reads the byte, at the physical address that the process has mapped there.
    DmaLoad,
    /// A device writes it.
    DmaStore(u8),
    /// madvise(MADV_DONTNEED).
    Discard,
    /// fallocate(PUNCH_HOLE) of the memory's file.
    Punch,
    /// A load instruction in a child made by fork.
    ForkLoad,
    /// munmap.
    Unmap,
    /// mprotect(PROT_READ).
    Protect,
    /// mlock.
    Lock,
    /// munlock.
    Unlock,
}

/// One step. Its [`Display`](fmt::Display) is the line that it was read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// RLIMIT_MEMLOCK in pages, and CAP_IPC_LOCK is given up.
    Memlock(u64),
    /// Maps memory.
    Memory {
        /// Its name.
        name: Name,
        /// Of what.
        backing: Backing,
        /// How many pages.
        pages: u64,
        /// 4 KiB or 2 MiB.
        size: Size,
    },
    /// KVM_CREATE_VM.
    Vm(Name, VmKind),
    /// KVM_SET_USER_MEMORY_REGION.
    Slot {
        /// Of which VM.
        vm: Name,
        /// KVM's number.
        slot: u16,
        /// Where the guest has it.
        ipa: Ipa,
        /// Where it comes from.
        pages: Pages,
        /// Flags.
        flags: SlotFlags,
    },
    /// A memslot of size 0.
    DeleteSlot(Name, u16),
    /// The memslot as it is, at another guest address.
    MoveSlot(Name, u16, Ipa),
    /// KVM_CREATE_VCPU and KVM_ARM_VCPU_INIT; the VM's first one brings the guest's program.
    Vcpu(VcpuName),
    /// KVM_RUN until the guest has done it.
    Guest(VcpuName, GuestAct),
    /// The VMM's own access.
    Host(HostAct, Place),
    /// VmLck, in pages.
    Locked,
    /// VmPin, in pages.
    Pinned,
    /// Closes the VM's descriptor.
    CloseVm(Name),
    /// Unmaps the vCPU's run structure and closes its descriptor.
    CloseVcpu(VcpuName),
    /// Closes the vCPU's descriptor alone.
    CloseVcpuFd(VcpuName),
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = Words::of(text);
        let step = match words.word("a step")? {
            "memlock" => Self::Memlock(words.number("a number of pages")?),
            "memory" => memory(&mut words)?,
            "vm" => {
                let vm = words.name("a name")?;
                match words.word("`protected` or `plain`")? {
                    "protected" => Self::Vm(vm, VmKind::Protected),
                    "plain" => Self::Vm(vm, VmKind::Plain),
                    other => return Err(format!("a VM is protected or plain, not `{other}`")),
                }
            }
            "slot" => slot(&mut words)?,
            "vcpu" => Self::Vcpu(words.vcpu()?),
            "guest" => Self::Guest(words.vcpu()?, guest(&mut words)?),
            "host" => {
                let (act, place) = host(&mut words)?;
                Self::Host(act, place)
            }
            "locked" => Self::Locked,
            "pinned" => Self::Pinned,
            "close" => {
                let what = words.word("a VM or a vCPU")?;
                match what.contains('.') {
                    true => Self::CloseVcpu(what.parse()?),
                    false => Self::CloseVm(what.parse()?),
                }
            }
            "close-fd" => Self::CloseVcpuFd(words.vcpu()?),
            other => return Err(format!("`{other}` is no step")),
        };
        words.end()?;
        Ok(step)
    }
}

fn memory(words: &mut Words<'_>) -> Result<Step, String> {
    let name = words.name("a name")?;
    let backing = match words.word("a backing")? {
        "anon" => Backing::Anon,
        "shared" => Backing::Shared,
        "memfd" => Backing::Memfd,
        "hugetlb" => Backing::Hugetlb,
        "guest-memfd" => Backing::GuestMemfd(words.name("a VM")?),
        other => return Err(format!("`{other}` is no backing")),
    };
    let pages = words.number("a number of pages")?;
    if pages == 0 || pages > MEMORY_PAGES_MAX {
        return Err(format!("a memory has 1 to {MEMORY_PAGES_MAX} pages, not {pages}"));
    }
    if backing == Backing::Hugetlb && pages % HUGE_PAGES != 0 {
        return Err(format!("{pages} pages are no whole hugetlb pages of {HUGE_PAGES}"));
    }
    let size = match words.next() {
        None => Size::Small,
        Some("huge") => Size::Huge,
        Some(other) => return Err(format!("`{other}` is no size of pages")),
    };
    Ok(Step::Memory { name, backing, pages, size })
}

fn slot(words: &mut Words<'_>) -> Result<Step, String> {
    let vm = words.name("a VM")?;
    let slot = words.number("the number of a slot")?;
    let slot = u16::try_from(slot).map_err(|_| format!("there is no slot {slot}"))?;
    match words.word("a guest address, `delete` or `move`")? {
        "delete" => Ok(Step::DeleteSlot(vm, slot)),
        "move" => Ok(Step::MoveSlot(vm, slot, words.ipa()?)),
        ipa => {
            let ipa = Ipa(number(ipa)?);
            let pages = words.pages()?;
            let mut flags = SlotFlags::default();
            while let Some(flag) = words.next() {
                match flag {
                    "readonly" => flags.readonly = true,
                    "log" => flags.log = true,
                    other => return Err(format!("`{other}` is no flag of a slot")),
                }
            }
            Ok(Step::Slot { vm, slot, ipa, pages, flags })
        }
    }
}

fn guest(words: &mut Words<'_>) -> Result<GuestAct, String> {
    Ok(match words.word("what the guest does")? {
        "load" => GuestAct::Load(words.ipa()?),
        "store" => GuestAct::Store(words.ipa()?, words.byte()?),
        "execute" => GuestAct::Execute(words.ipa()?),
        "share" => GuestAct::Share(words.ipa()?),
        "unshare" => GuestAct::Unshare(words.ipa()?),
        "hvc" => {
            let mut registers = [0; 4];
            registers[0] = words.number("x0")?;
            for register in &mut registers[1..] {
                *register = words.next().map_or(Ok(0), number)?;
            }
            GuestAct::Hvc(registers)
        }
        "resume" => GuestAct::Resume,
        other => return Err(format!("no guest can `{other}`")),
    })
}

/// The words of those acts that carry no byte.
const PLAIN: &[(&str, HostAct)] = &[
    ("load", HostAct::Load),
    ("write", HostAct::Write),
    ("vm-read", HostAct::VmRead),
    ("mem-read", HostAct::MemRead),
    ("splice", HostAct::Splice),
    ("pin", HostAct::Pin),
    ("file-read", HostAct::FileRead),
    ("sendfile", HostAct::SendFile),
    ("dma-load", HostAct::DmaLoad),
    ("discard", HostAct::Discard),
    ("punch", HostAct::Punch),
    ("fork-load", HostAct::ForkLoad),
    ("unmap", HostAct::Unmap),
    ("protect", HostAct::Protect),
    ("lock", HostAct::Lock),
    ("unlock", HostAct::Unlock),
];

/// Makes the act that carries this byte.
type WithByte = fn(u8) -> HostAct;

const WITH_BYTE: &[(&str, WithByte)] = &[
    ("store", HostAct::Store),
    ("read", HostAct::Read),
    ("vm-write", HostAct::VmWrite),
    ("mem-write", HostAct::MemWrite),
    ("file-write", HostAct::FileWrite),
    ("dma-store", HostAct::DmaStore),
];

fn host(words: &mut Words<'_>) -> Result<(HostAct, Place), String> {
    let word = words.word("what the host does")?;
    if let Some((_, act)) = PLAIN.iter().find(|(name, _)| *name == word) {
        return Ok((*act, words.place()?));
    }
    let (_, act) = WITH_BYTE
        .iter()
        .find(|(name, _)| *name == word)
        .ok_or_else(|| format!("no host can `{word}`"))?;
    let place = words.place()?;
    Ok((act(words.byte()?), place))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memlock(pages) => write!(f, "memlock {pages}"),
            Self::Memory { name, backing, pages, size } => {
                let huge = if *size == Size::Huge { " huge" } else { "" };
                write!(f, "memory {name} {backing} {pages}{huge}")
            }
            Self::Vm(vm, VmKind::Protected) => write!(f, "vm {vm} protected"),
            Self::Vm(vm, VmKind::Plain) => write!(f, "vm {vm} plain"),
            Self::Slot { vm, slot, ipa, pages, flags } => {
                write!(f, "slot {vm} {slot} {ipa} {pages}")?;
                f.write_str(if flags.readonly { " readonly" } else { "" })?;
                f.write_str(if flags.log { " log" } else { "" })
            }
            Self::DeleteSlot(vm, slot) => write!(f, "slot {vm} {slot} delete"),
            Self::MoveSlot(vm, slot, ipa) => write!(f, "slot {vm} {slot} move {ipa}"),
            Self::Vcpu(vcpu) => write!(f, "vcpu {vcpu}"),
            Self::Guest(vcpu, act) => write!(f, "guest {vcpu} {act}"),
            Self::Host(act, place) => write_host(f, *act, place),
            Self::Locked => f.write_str("locked"),
            Self::Pinned => f.write_str("pinned"),
            Self::CloseVm(vm) => write!(f, "close {vm}"),
            Self::CloseVcpu(vcpu) => write!(f, "close {vcpu}"),
            Self::CloseVcpuFd(vcpu) => write!(f, "close-fd {vcpu}"),
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anon => f.write_str("anon"),
            Self::Shared => f.write_str("shared"),
            Self::Memfd => f.write_str("memfd"),
            Self::Hugetlb => f.write_str("hugetlb"),
            Self::GuestMemfd(vm) => write!(f, "guest-memfd {vm}"),
        }
    }
}

impl fmt::Display for GuestAct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load(ipa) => write!(f, "load {ipa}"),
            Self::Store(ipa, byte) => write!(f, "store {ipa} {byte:#x}"),
            Self::Execute(ipa) => write!(f, "execute {ipa}"),
            Self::Share(ipa) => write!(f, "share {ipa}"),
            Self::Unshare(ipa) => write!(f, "unshare {ipa}"),
            Self::Hvc([x0, x1, x2, x3]) => write!(f, "hvc {x0:#x} {x1:#x} {x2:#x} {x3:#x}"),
            Self::Resume => f.write_str("resume"),
        }
    }
}

fn write_host(f: &mut fmt::Formatter<'_>, act: HostAct, place: &Place) -> fmt::Result {
    if let Some((word, _)) = PLAIN.iter().find(|(_, plain)| *plain == act) {
        return write!(f, "host {word} {place}");
    }
    let (word, byte) = match act {
        HostAct::Store(byte) => ("store", byte),
        HostAct::Read(byte) => ("read", byte),
        HostAct::VmWrite(byte) => ("vm-write", byte),
        HostAct::MemWrite(byte) => ("mem-write", byte),
        HostAct::FileWrite(byte) => ("file-write", byte),
        HostAct::DmaStore(byte) => ("dma-store", byte),
        // The words above have found all others.
        _ => return Err(fmt::Error),
    };
    write!(f, "host {word} {place} {byte:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_prints_as_it_reads() {
        let plain = PLAIN.iter().map(|(word, _)| format!("host {word} m[3]+0x10"));
        let with_byte = WITH_BYTE.iter().map(|(word, _)| format!("host {word} m[0] 0x5a"));
        let others = [
            "memlock 3",
            "memory m anon 4",
            "memory m shared 1024 huge",
            "memory f memfd 4",
            "memory h hugetlb 1024",
            "memory g guest-memfd v 4",
            "vm v protected",
            "vm w2 plain",
            "slot v 0 0x80000000 m[0..4]",
            "slot v 7 0x80000000 m[1..2] readonly log",
            "slot v 0 delete",
            "slot v 0 move 0x90000000",
            "vcpu v.0",
            "guest v.1 load 0x80000000",
            "guest v.0 store 0x80000000 0x7f",
            "guest v.0 execute 0x80000000",
            "guest v.0 share 0x80000000",
            "guest v.0 unshare 0x80000000",
            "guest v.0 hvc 0xc6000003 0x80000000 0x1 0x0",
            "guest v.0 resume",
            "locked",
            "pinned",
            "close v",
            "close v.0",
            "close-fd v.0",
        ];
        for text in others.map(String::from).into_iter().chain(plain).chain(with_byte) {
            let step: Step = text.parse().unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!(step.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_step_is_refused() {
        for text in [
            "",
            "boot",
            "memlock",
            "memlock many",
            "memory m anon 0",
            "memory m anon 99999",
            "memory m hugetlb 513",
            "memory m tape 4",
            "memory m anon 4 giant",
            "memory M anon 4",
            "vm v",
            "vm v secure",
            "vm v plain now",
            "slot v 0",
            "slot v 70000 0 m[0..1]",
            "slot v 0 0x80000000 m[1..1]",
            "slot v 0 0x80000000 m[0]",
            "slot v 0 0x80000000 m[0..1] shiny",
            "vcpu v",
            "vcpu v.x",
            "guest v.0",
            "guest v.0 fly",
            "guest v.0 store 0x80000000 0x100",
            "guest v.0 hvc",
            "guest v.0 hvc 1 2 3 4 5",
            "host load",
            "host load m",
            "host load m[0]+4096",
            "host load m[0] 1",
            "host store m[0]",
            "host gaze m[0]",
            "close",
        ] {
            assert!(text.parse::<Step>().is_err(), "`{text}` was read");
        }
    }
}
