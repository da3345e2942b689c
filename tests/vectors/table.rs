//! The table. What the kernel answers was measured on Linux 6.18; what newer kernels answer otherwise is said.

use libc::{EFAULT, EINVAL, EIO, ENOMEM, ENOTTY, ENXIO, EOPNOTSUPP, EPERM, ESPIPE, EXDEV};

use crate::kvm;
use crate::subject::Answer::{Bus, Byte, Done, Errno, Number};
use crate::subject::MemoryCall as M;
use crate::subject::Why::{
    Committed, DescriptorIsAName, OneUserfault, TypesSayLess, ViewIsOrdinaryMemory, ViewsDoNotFill,
    WholeViewsOnly,
};
use crate::subject::{Access, Answer, FdCall, Map, MemoryCall, Op, Ours, PAGE, SIZE, Side, Why};

pub(crate) struct Vector {
    pub(crate) name: &'static str,
    pub(crate) side: Side,
    pub(crate) steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) op: Op,
    pub(crate) kernel: Answer,
    pub(crate) ours: Ours,
}

/// Both answer this.
fn same(op: Op, answer: Answer) -> Step {
    Step { op, kernel: answer, ours: Ours::Same }
}

fn differs(op: Op, kernel: Answer, ours: Answer, why: Why) -> Step {
    Step { op, kernel, ours: Ours::Differs(ours, why) }
}

/// The kernel answers this; gmem has no such call.
fn kernels(op: Op, kernel: Answer, why: Why) -> Step {
    Step { op, kernel, ours: Ours::CannotBeSaid(why) }
}

fn load(at: u64, answer: Answer) -> Step {
    same(Op::Touch(at, Access::Load), answer)
}

fn store(at: u64, answer: Answer) -> Step {
    same(Op::Touch(at, Access::Store), answer)
}

fn memory(at: u64, call: MemoryCall, answer: Answer) -> Step {
    same(Op::Memory(at, call), answer)
}

fn poke(at: u64, byte: u8) -> Step {
    same(Op::Poke(at, byte), Done)
}

fn map() -> Step {
    same(Op::Map(Map::Whole), Done)
}

/// Not in every libc.
const MADV_COLLAPSE: i32 = 25;
const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
const P: i64 = PAGE as i64;
const END: i64 = SIZE as i64;
/// A page in the middle of a huge folio.
const MID: u64 = 7 * PAGE;

pub(crate) fn vectors() -> Vec<Vector> {
    let mut all = Vec::new();
    let mut add = |name, side, steps| all.push(Vector { name, side, steps });
    add("creation", Side::Shared, creation());
    for side in [Side::Shared, Side::Private] {
        add("file operations", side, file_operations());
        add("fallocate", side, fallocate());
        add("ways to map", side, ways_to_map());
    }
    add("shared memory", Side::Shared, shared_memory());
    add("holes", Side::Shared, holes());
    add("private memory", Side::Private, private_memory());
    add("system calls on shared memory", Side::Shared, calls_on_shared());
    add("system calls on private memory", Side::Private, calls_on_private());
    add("advice on shared memory", Side::Shared, advice_on_shared());
    add("advice on private memory", Side::Private, advice_on_private());
    add("a closed descriptor", Side::Shared, closed());
    all
}

fn creation() -> Vec<Step> {
    let create = |size, flags, answer| same(Op::Create(size, flags), answer);
    let flags = kvm::MMAP | kvm::INIT_SHARED;
    let mut steps = vec![
        create(PAGE, flags, Done),
        create(PAGE, kvm::MMAP, Done),
        create(512 * PAGE, flags, Done),
        // Without MMAP the kernel's cannot be mapped; ours is by its views alone, and always can.
        create(PAGE, 0, Done),
        create(PAGE, kvm::INIT_SHARED, Done),
        differs(Op::Create(1 << 62, flags), Done, Errno(ENOMEM), Committed),
        kernels(Op::Create(PAGE, 4), Errno(EINVAL), TypesSayLess),
        kernels(Op::Create(PAGE, 1 << 63), Errno(EINVAL), TypesSayLess),
    ];
    for size in [0, 1, PAGE - 1, PAGE + 1, 1 << 63, u64::MAX, (1 << 63) + PAGE] {
        steps.push(create(size, flags, Errno(EINVAL)));
    }
    steps
}

fn file_operations() -> Vec<Step> {
    use FdCall as F;
    let fd = |call, answer| same(Op::Fd(call), answer);
    let name = |call, kernel, ours| differs(Op::Fd(call), kernel, ours, DescriptorIsAName);
    vec![
        name(F::Mode, Number(0o100_600), Number(0o100_777)),
        name(F::Read, Errno(EINVAL), Number(0)),
        name(F::Write, Errno(EINVAL), Errno(EPERM)),
        name(F::Pread, Errno(ESPIPE), Number(0)),
        name(F::Pwrite, Errno(ESPIPE), Errno(EPERM)),
        name(F::Lseek(libc::SEEK_SET), Errno(ESPIPE), Done),
        name(F::Lseek(libc::SEEK_END), Errno(ESPIPE), Done),
        name(F::Truncate(0), Errno(EINVAL), Done),
        name(F::Truncate(END), Errno(EINVAL), Errno(EPERM)),
        name(F::Truncate(END + P), Errno(EINVAL), Errno(EPERM)),
        fd(F::Truncate(-1), Errno(EINVAL)),
        name(F::Chmod, Errno(EINVAL), Done),
        name(F::Chown, Errno(EINVAL), Done),
        name(F::SetTimes, Errno(EINVAL), Done),
        name(F::Sync, Errno(EINVAL), Done),
        name(F::DataSync, Errno(EINVAL), Done),
        fd(F::SyncRange, Done),
        fd(F::Advise, Done),
        name(F::GetSeals, Errno(EINVAL), Number(7)),
        name(F::AddSeals, Errno(EINVAL), Errno(EPERM)),
        fd(F::Lock, Done),
        name(F::Reopen, Errno(ENXIO), Done),
        fd(F::Ioctl, Errno(ENOTTY)),
        fd(F::CopyRange, Errno(EXDEV)),
        name(F::Splice, Errno(EINVAL), Number(0)),
        name(F::Size, Number(END), Number(0)),
        fd(F::Blocks, Number(0)),
        fd(F::BlockSize, Number(4096)),
        fd(F::Duplicate, Number(4096)),
        name(F::IsCloseOnExec, Number(0), Number(1)),
    ]
}

fn fallocate() -> Vec<Step> {
    let call = |mode, offset, len, answer| same(Op::Fallocate(mode, offset, len), answer);
    let mut steps = Vec::new();
    for mode in [
        0,
        libc::FALLOC_FL_PUNCH_HOLE,
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
        libc::FALLOC_FL_ZERO_RANGE | KEEP,
        libc::FALLOC_FL_UNSHARE_RANGE | KEEP,
        1 << 20,
    ] {
        steps.push(kernels(Op::Fallocate(mode, 0, P), Errno(EOPNOTSUPP), TypesSayLess));
    }
    for mode in [KEEP, PUNCH] {
        steps.extend([
            call(mode, 0, P, Done),
            call(mode, 0, P, Done),
            call(mode, P, 3 * P, Done),
            call(mode, 0, END, Done),
            call(mode, END - P, P, Done),
            call(mode, 1, P, Errno(EINVAL)),
            call(mode, 0, 1, Errno(EINVAL)),
            call(mode, P / 2, P / 2, Errno(EINVAL)),
            call(mode, 0, 0, Errno(EINVAL)),
            call(mode, -P, P, Errno(EINVAL)),
            call(mode, 0, -P, Errno(EINVAL)),
            differs(
                Op::Fallocate(mode, i64::MAX - P + 1, P),
                Errno(libc::EFBIG),
                Errno(EINVAL),
                TypesSayLess,
            ),
        ]);
    }
    steps.extend([
        call(KEEP, END, P, Errno(EINVAL)),
        call(KEEP, END - P, 2 * P, Errno(EINVAL)),
        call(KEEP, 0, END + P, Errno(EINVAL)),
        call(KEEP, 1 << 40, P, Errno(EINVAL)),
        call(PUNCH, END, P, Done),
        call(PUNCH, END - P, 2 * P, Done),
        call(PUNCH, 0, END + P, Done),
        call(PUNCH, 1 << 40, P, Done),
    ]);
    steps
}

fn ways_to_map() -> Vec<Step> {
    let cannot = |how, answer| kernels(Op::Map(how), answer, WholeViewsOnly);
    vec![
        cannot(Map::Private, Errno(EINVAL)),
        cannot(Map::Executable, Errno(EPERM)),
        cannot(Map::Unaligned, Errno(EINVAL)),
        cannot(Map::Huge, Errno(EINVAL)),
        cannot(Map::ReadOnly, Done),
        cannot(Map::BeyondTheEnd, Done),
        kernels(Op::Touch(SIZE, Access::Load), Bus(SIZE), WholeViewsOnly),
        map(),
    ]
}

fn shared_memory() -> Vec<Step> {
    vec![
        map(),
        load(0, Byte(0)),
        store(0, Byte(0)),
        load(MID + 5, Byte(0)),
        poke(MID + 5, 9),
        load(MID + 5, Byte(9)),
        store(MID + 5, Byte(9)),
        load(SIZE - 1, Byte(0)),
        store(SIZE - 1, Byte(0)),
        poke(SIZE - 1, 8),
        load(SIZE - 1, Byte(8)),
        // Allocating does not touch what is there.
        same(Op::Fallocate(KEEP, 0, END), Done),
        load(MID + 5, Byte(9)),
        load(SIZE - 1, Byte(8)),
    ]
}

fn holes() -> Vec<Step> {
    let hole = |at, access| differs(Op::Touch(at, access), Byte(0), Bus(at), ViewsDoNotFill);
    let tail = SIZE - PAGE;
    vec![
        map(),
        poke(MID, 1),
        poke(MID + PAGE, 2),
        poke(tail, 3),
        same(Op::Fallocate(PUNCH, MID as i64, P), Done),
        hole(MID, Access::Load),
        hole(MID + 4095, Access::Store),
        differs(Op::Memory(MID, M::Write), Number(16), Errno(EFAULT), ViewsDoNotFill),
        load(MID + PAGE, Byte(2)),
        same(Op::Fallocate(KEEP, MID as i64, P), Done),
        load(MID, Byte(0)),
        poke(MID, 4),
        // All of it, and once more.
        same(Op::Fallocate(PUNCH, 0, END), Done),
        same(Op::Fallocate(PUNCH, 0, END), Done),
        hole(MID, Access::Load),
        hole(tail, Access::Store),
        same(Op::Fallocate(KEEP, 0, END), Done),
        load(MID, Byte(0)),
        store(MID + PAGE, Byte(0)),
        load(tail, Byte(0)),
    ]
}

fn private_memory() -> Vec<Step> {
    let mut steps = vec![map()];
    for at in [0, 1, MID + 0x123, (2 << 20) - 1, 2 << 20, SIZE - 1] {
        steps.extend([load(at, Bus(at)), store(at, Bus(at))]);
    }
    steps.push(same(Op::Fallocate(KEEP, 0, END), Done));
    steps.extend([load(MID + 7, Bus(MID + 7)), store(SIZE - 1, Bus(SIZE - 1))]);
    steps.push(same(Op::Fallocate(PUNCH, 0, END), Done));
    steps.extend([load(MID + 7, Bus(MID + 7)), store(SIZE - 1, Bus(SIZE - 1))]);
    steps
}

fn calls_on_shared() -> Vec<Step> {
    let mut steps = vec![map()];
    for at in [0, MID, SIZE - PAGE] {
        steps.extend([
            poke(at, 1),
            memory(at, M::Write, Number(16)),
            memory(at, M::Read, Number(16)),
            load(at, Byte(0)),
            memory(at, M::ProcessVmWrite, Number(16)),
            load(at + 15, Byte(0x5a)),
            poke(at, 7),
            memory(at, M::ProcessVmRead, Number(16)),
            memory(at, M::DirectWrite, Number(4096)),
            memory(at, M::DirectRead, Number(4096)),
            load(at, Byte(0x5a)),
            load(at + 4095, Byte(0x5a)),
            poke(at, 6),
            memory(at, M::VmSplice, Number(16)),
            memory(at, M::RegisterBuffer, Done),
            load(at, Byte(6)),
            memory(at, M::FixedRead, Number(4096)),
            load(at, Byte(0x5a)),
            memory(at, M::ProcMemRead, Number(16)),
            memory(at, M::Lock, Done),
            memory(at, M::LockOnFault, Done),
        ]);
        steps.extend(odd_calls(at, Errno(libc::EBUSY)));
    }
    steps
}

/// Somebody else's userfaultfd can be had where there is no folio yet, which it does not bring either.
fn odd_calls(at: u64, registered: Answer) -> [Step; 2] {
    let execute = Op::Memory(at, M::ProtectExecute);
    let userfault = Op::Memory(at, M::RegisterUserfault);
    [
        differs(execute, Errno(libc::EACCES), Done, ViewIsOrdinaryMemory),
        differs(userfault, Errno(EINVAL), registered, OneUserfault),
    ]
}

fn calls_on_private() -> Vec<Step> {
    let mut steps = vec![map()];
    for at in [0, MID, SIZE - PAGE] {
        for call in [
            M::Write,
            M::Read,
            M::ProcessVmRead,
            M::ProcessVmWrite,
            M::DirectRead,
            M::DirectWrite,
            M::VmSplice,
            M::RegisterBuffer,
            M::FixedRead,
        ] {
            steps.push(memory(at, call, Errno(EFAULT)));
        }
        steps.push(memory(at, M::ProcMemRead, Errno(EIO)));
        steps.push(memory(at, M::Lock, Errno(ENOMEM)));
        steps.push(memory(at, M::LockOnFault, Done));
        steps.extend(odd_calls(at, Done));
        steps.push(load(at, Bus(at)));
    }
    steps
}

fn advice_on_shared() -> Vec<Step> {
    let advise = |advice, answer| same(Op::Advise(advice, MID, PAGE), answer);
    let gone = |at, byte| differs(Op::Touch(at, Access::Load), Byte(byte), Bus(at), ViewsDoNotFill);
    vec![
        map(),
        poke(MID, 5),
        advise(libc::MADV_POPULATE_READ, Done),
        advise(libc::MADV_POPULATE_WRITE, Done),
        advise(libc::MADV_COLD, Done),
        load(MID, Byte(5)),
        advise(libc::MADV_FREE, Errno(EINVAL)),
        advise(libc::MADV_WIPEONFORK, Errno(EINVAL)),
        advise(libc::MADV_MERGEABLE, Done),
        advise(libc::MADV_HUGEPAGE, Done),
        advise(libc::MADV_NOHUGEPAGE, Done),
        advise(MADV_COLLAPSE, Errno(EINVAL)),
        load(MID, Byte(5)),
        advise(libc::MADV_DONTNEED, Done),
        gone(MID, 5),
        // Not by the object: it does not know.
        same(Op::Fallocate(KEEP, MID as i64, P), Done),
        gone(MID, 5),
        poke(MID + PAGE, 6),
        same(Op::Advise(libc::MADV_PAGEOUT, MID + PAGE, PAGE), Done),
        gone(MID + PAGE, 6),
        poke(MID + 2 * PAGE, 7),
        same(Op::Advise(libc::MADV_REMOVE, MID + 2 * PAGE, PAGE), Done),
        gone(MID + 2 * PAGE, 0),
    ]
}

fn advice_on_private() -> Vec<Step> {
    let advise = |advice, answer| same(Op::Advise(advice, MID, PAGE), answer);
    vec![
        map(),
        advise(libc::MADV_POPULATE_READ, Errno(EFAULT)),
        advise(libc::MADV_POPULATE_WRITE, Errno(EFAULT)),
        advise(libc::MADV_DONTNEED, Done),
        advise(libc::MADV_COLD, Done),
        advise(libc::MADV_PAGEOUT, Done),
        advise(libc::MADV_REMOVE, Done),
        load(MID, Bus(MID)),
    ]
}

fn closed() -> Vec<Step> {
    vec![
        map(),
        poke(MID, 5),
        same(Op::Close, Done),
        load(MID, Byte(5)),
        memory(MID, M::Write, Number(16)),
        store(SIZE - 1, Byte(0)),
    ]
}
