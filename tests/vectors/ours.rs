//! gmem carries the table out.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use gmem::addr::{self, ByteSize, Offset};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, FaultCause, FolioPool, GuestMemfd, HostView, SigbusHandler, Touch, Visibility,
};

use crate::calls;
use crate::kvm;
use crate::subject::{Access, Answer, Map, Op, SIZE, Side, Subject};

pub(crate) struct Gmem {
    pool: FolioPool,
    memfd: Option<GuestMemfd>,
    view: Option<HostView>,
    handler: SigbusHandler,
}

impl Gmem {
    pub(crate) fn new(side: Side) -> Self {
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(8)).unwrap();
        let initial = match side {
            Side::Shared => Visibility::Shared,
            Side::Private => Visibility::Private,
        };
        let memfd =
            GuestMemfd::builder(ByteSize::from_bytes(SIZE)).initial(initial).create(&pool).unwrap();
        let handler = SigbusHandler::install().unwrap();
        Self { pool, memfd: Some(memfd), view: None, handler }
    }

    fn memfd(&self) -> &GuestMemfd {
        self.memfd.as_ref().unwrap()
    }

    fn view(&self) -> &HostView {
        self.view.as_ref().unwrap()
    }

    fn pointer(&self, at: u64) -> NonNull<u8> {
        self.view().pointer(Offset::new(at), ByteSize::from_bytes(1)).unwrap()
    }

    fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Answer {
        let [offset, len] = [offset, len].map(|number| u64::from_ne_bytes(number.to_ne_bytes()));
        let range = PgoffRange::from_bytes(Offset::new(offset), ByteSize::from_bytes(len));
        let memfd = self.memfd();
        let done = match mode {
            libc::FALLOC_FL_KEEP_SIZE => range.and_then(|range| memfd.allocate(range)),
            PUNCH => range.and_then(|range| memfd.punch_hole(range).map(drop)),
            other => panic!("gmem has no call for fallocate mode {other:#x}"),
        };
        done.map_or_else(|error| Answer::Errno(error.errno().get()), |()| Answer::Done)
    }

    fn touch(&self, at: u64, access: Access) -> Answer {
        let access = match access {
            Access::Load => addr::Access::Read,
            Access::Store => addr::Access::Write,
        };
        match self.view().touch(self.handler, Offset::new(at), access).unwrap() {
            Touch::Byte(byte) => Answer::Byte(byte),
            Touch::Fault(fault) => {
                assert_eq!(fault.cause, FaultCause::NotMapped);
                assert_eq!(Some(fault.hva), self.view().hva_of(fault.offset));
                Answer::Bus(fault.offset.get())
            }
        }
    }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

impl Subject for Gmem {
    fn apply(&mut self, op: &Op) -> Answer {
        match *op {
            Op::Create(size, flags) => {
                let initial = match flags & kvm::INIT_SHARED {
                    0 => Visibility::Private,
                    _ => Visibility::Shared,
                };
                let builder = GuestMemfd::builder(ByteSize::from_bytes(size)).initial(initial);
                match builder.create(&self.pool) {
                    Ok(_) => Answer::Done,
                    Err(error) => Answer::Errno(error.errno().get()),
                }
            }
            Op::Fd(call) => calls::on_fd(self.memfd().as_fd().as_raw_fd(), call),
            Op::Fallocate(mode, offset, len) => self.fallocate(mode, offset, len),
            Op::Map(Map::Whole) => match self.memfd().map_view() {
                Ok(view) => {
                    self.view = Some(view);
                    Answer::Done
                }
                Err(error) => Answer::Errno(error.errno().get()),
            },
            Op::Map(other) => panic!("gmem has no call for {other:?}"),
            Op::Touch(at, access) => self.touch(at, access),
            Op::Poke(at, byte) => {
                // SAFETY: shared memory, which the view has mapped.
                unsafe { self.pointer(at).as_ptr().write_volatile(byte) };
                Answer::Done
            }
            Op::Memory(at, call) => calls::on_memory(self.pointer(at).as_ptr(), call),
            Op::Advise(advice, at, len) => calls::advise(self.pointer(at).as_ptr(), len, advice),
            Op::Close => {
                // The view is a handle, too.
                self.memfd = None;
                Answer::Done
            }
        }
    }
}

/// Whoever maps the descriptor sees what the kernel shows of private memory.
#[test]
fn the_descriptor_maps_as_private_memory_does() {
    let gmem = Gmem::new(Side::Shared);
    gmem.memfd().write(Offset::new(0), b"secret").unwrap();
    let fd: OwnedFd = gmem.memfd().as_fd().try_clone_to_owned().unwrap();
    let len = SIZE as usize;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: no address is asked for, so nothing is replaced.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd.as_raw_fd(), 0) };
    assert_ne!(at, libc::MAP_FAILED);
    let at = at.cast::<u8>();
    assert_eq!(crate::kernels::touch(at, 5, Access::Load), Answer::Bus(5));
    let efault = Answer::Errno(libc::EFAULT);
    assert_eq!(calls::on_memory(at, crate::subject::MemoryCall::Read), efault);
    // SAFETY: mapped above, used no more.
    unsafe { libc::munmap(at.cast(), len) };
}
