//! The crates that others build machines of, over the vm-memory adapter, unchanged: linux-loader, vhost and
//! vhost-user; and the log of what devices write.

// UNSAFETY: receives a descriptor over a socket, as a vhost-user backend does.
#![expect(unsafe_code, reason = "the other end of vhost-user is played by hand")]

mod common;

use std::io::Cursor;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Capability, require};
use gmem::addr::{ByteSize, Gfn, Offset, Pgoff};
use gmem::error::ErrorKind;
use gmem::range::{GfnRange, PgoffRange};
use gmem::vm_memory::{AddressSpace, Slot};
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HostView, PartSpec, Visibility, Zone,
};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vhost::VhostBackend;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_kern::vsock::Vsock;
use vhost::vhost_user::Frontend;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
    MemoryRegionAddress,
};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const RAM: u64 = 0x8000_0000;

fn pages(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn frames(start: u64, nr_pages: u64) -> GfnRange {
    GfnRange::new(Gfn::new(RAM / PAGE + start), nr_pages).unwrap()
}

fn at(offset: u64) -> GuestAddress {
    GuestAddress(RAM + offset)
}

struct Guest {
    memfd: GuestMemfd,
    view: Arc<HostView>,
    space: AddressSpace,
}

/// A guest whose pool is its own, with the object in two slots: 1 MiB at the beginning of RAM, the rest behind a gap.
fn guest() -> Option<Guest> {
    require(Capability::Uffd).then(|| {
        let part = PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(8));
        let pool = FolioPool::builder().part(part, Zone::Normal).dedicated().create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        let view = Arc::new(memfd.map_view().unwrap());
        let slot = |gfn, pages| Slot { gfn: Gfn::new(RAM / PAGE + gfn), view: view.clone(), pages };
        let slots = [slot(0, pages(0, 256)), slot(512, pages(256, 768))];
        let space = AddressSpace::new("device", slots).unwrap();
        Guest { memfd, view, space }
    })
}

#[test]
fn what_devices_write_is_logged() {
    let Some(guest) = guest() else { return };
    assert!(!guest.space.memory().iter().next().unwrap().bitmap().dirty_at(0));
    let space = guest.space.with_dirty_log().unwrap();
    let net = space.for_owner("virtio-net").unwrap();
    assert_eq!(space.take_dirty(), []);

    let memory = space.memory();
    memory.write_slice(&[1; 5000], at(PAGE - 1)).unwrap();
    memory.read_slice(&mut [0; 64], at(9 * PAGE)).unwrap();
    memory.store(7_u64, at(4 * PAGE), Ordering::SeqCst).unwrap();
    memory.get_slice(at(6 * PAGE + 5), 2).unwrap().write_slice(&[1, 2], 0).unwrap();
    memory.get_slice(at(7 * PAGE), 16).unwrap();
    let bitmap = memory.find_region(at(0)).unwrap().bitmap();
    assert!(bitmap.dirty_at(4 * PAGE as usize) && !bitmap.dirty_at(5 * PAGE as usize));
    // By another device, in the other slot, and by the region.
    let other = net.memory();
    other.write_obj(3_u32, at(2 * MIB)).unwrap();
    let region = other.find_region(at(2 * MIB)).unwrap();
    region.write_slice(&[9; 4], MemoryRegionAddress(3 * MIB - 4)).unwrap();
    region
        .read_volatile_from(MemoryRegionAddress(PAGE), &mut Cursor::new([5_u8; 4096]), 4096)
        .unwrap();
    let expected = [frames(0, 3), frames(4, 1), frames(6, 1), frames(512, 2), frames(512 + 767, 1)];
    assert_eq!(space.take_dirty(), expected);
    assert_eq!(net.take_dirty(), [], "one log for all");
    // Private memory is not written, and not logged by what is refused before it began.
    let page = guest.memfd.convert(pages(20, 1), Visibility::Private, ContentPolicy::Preserve);
    assert_eq!(page.unwrap().changed_pages(), 1);
    assert!(memory.get_slice(at(20 * PAGE), 1).is_err());
    assert_eq!(space.take_dirty(), []);
    // Who did not ask has none.
    guest.space.memory().write_obj(1_u8, at(0)).unwrap();
    assert_eq!((guest.space.take_dirty(), space.take_dirty()), (vec![], vec![]));
}

#[test]
fn only_what_was_exported_has_a_file() {
    let Some(guest) = guest() else { return };
    let files = |space: &AddressSpace| {
        let memory = space.memory();
        memory.iter().map(|region| region.file_offset().cloned()).collect::<Vec<_>>()
    };
    assert!(files(&guest.space).iter().all(Option::is_none));
    let backend = guest.memfd.register_owner("vhost-user").unwrap();
    let export = Arc::new(guest.memfd.export(pages(0, 256), backend).unwrap());
    let lent = guest.space.with_export(&export).unwrap();
    let [Some(file), None] = &files(&lent)[..] else { panic!("the first slot alone") };
    guest.memfd.write(Offset::new(123), b"in the file").unwrap();
    let mut seen = [0; 11];
    std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut seen, file.start() + 123).unwrap();
    assert_eq!(&seen, b"in the file");
    // Lent for as long as the address space says where.
    drop(export);
    let again = lent.for_owner("other").unwrap();
    drop(lent);
    let to_private =
        || guest.memfd.convert(pages(0, 1), Visibility::Private, ContentPolicy::Preserve);
    assert_eq!(to_private().unwrap_err().kind(), ErrorKind::Busy);
    drop(again);
    assert!(to_private().is_ok());
}

#[test]
fn regions_on_small_pages_say_so() {
    let Some(guest) = guest() else { return };
    assert_eq!(guest.space.memory().iter().next().unwrap().is_hugetlbfs(), Some(false));
}

#[test]
fn linux_loader_loads() {
    let Some(guest) = guest() else { return };
    let memory = guest.space.memory();
    let mut cmdline = Cmdline::new(64).unwrap();
    cmdline.insert_str("console=ttyS0").unwrap();
    load_cmdline(&*memory, at(0x2000), &cmdline).unwrap();
    let mut seen = [1; 14];
    guest.memfd.read(Offset::new(0x2000), &mut seen).unwrap();
    assert_eq!(&seen, b"console=ttyS0\0");
    let to_private =
        guest.memfd.convert(pages(8, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
    assert_eq!(to_private.changed_pages(), 1);
    assert!(load_cmdline(&*memory, at(0x8000), &cmdline).is_err(), "private");
    #[cfg(target_arch = "x86_64")]
    {
        use linux_loader::loader::{Elf, KernelLoader};
        let mut image = Cursor::new(elf(RAM + 0x1_0000, b"the kernel"));
        let loaded = Elf::load(&*memory, None, &mut image, None).unwrap();
        assert_eq!(loaded.kernel_load, at(0x1_0000));
        let mut seen = [0; 10];
        guest.memfd.read(Offset::new(0x1_0000), &mut seen).unwrap();
        assert_eq!(&seen, b"the kernel");
        let mut image = Cursor::new(elf(RAM + 0x8000, b"the kernel"));
        assert!(Elf::load(&*memory, None, &mut image, None).is_err(), "private");
    }
}

/// The smallest file that is a kernel: a header, one segment, its bytes.
#[cfg(target_arch = "x86_64")]
fn elf(load_at: u64, code: &[u8]) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    for half in [2_u16, 62] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1_u32.to_le_bytes());
    for word in [load_at, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for half in [1_u32, 5] {
        image.extend(half.to_le_bytes());
    }
    let len = code.len() as u64;
    for word in [64 + 56, load_at, load_at, len, len, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

/// The bounds are vhost's own; the device needs a module of the kernel's.
#[test]
fn vhost_takes_the_address_space() {
    let Some(guest) = guest() else { return };
    match Vsock::new(guest.space.clone()) {
        Ok(vsock) => {
            vsock.set_owner().unwrap();
            let region = VhostUserMemoryRegionInfo {
                guest_phys_addr: RAM,
                memory_size: MIB,
                userspace_addr: guest.view.hva().get() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            };
            vsock.set_mem_table(&[region]).unwrap();
        }
        Err(error) => println!("no vhost-vsock here: {error}"),
    }
}

/// What a vhost-user backend is sent: enough to map the memory by.
#[test]
fn a_vhost_user_backend_gets_the_files() {
    let Some(guest) = guest() else { return };
    let owner = guest.memfd.register_owner("vhost-user").unwrap();
    let export = Arc::new(guest.memfd.export(pages(0, 256), owner).unwrap());
    let space = guest.space.with_export(&export).unwrap();
    let memory = space.memory();
    let region = memory.find_region(at(0)).unwrap();
    let file = region.file_offset().unwrap();
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.get_host_address(MemoryRegionAddress(0)).unwrap().addr() as u64,
        mmap_offset: file.start(),
        mmap_handle: file.file().as_raw_fd(),
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let frontend = Frontend::from_stream(ours, 1);
    frontend.set_mem_table(&[info]).unwrap();

    let (message, fd) = receive(&theirs);
    // A header of 12 bytes, how many regions, padding, and four numbers for the region.
    let word = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(8), word(12)), (5, 40, 1));
    assert_eq!((long(20), long(28)), (RAM, MIB));
    guest.memfd.write(Offset::new(0), b"for the backend").unwrap();
    let mut seen = [0; 15];
    rustix::io::pread(&fd, &mut seen, long(44)).unwrap();
    assert_eq!(&seen, b"for the backend");
}

fn receive(socket: &UnixStream) -> (Vec<u8>, OwnedFd) {
    let mut bytes = vec![0_u8; 256];
    let mut control = [0_u64; 4];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a structure of numbers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control) as _;
    // SAFETY: everything it points to lives.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    assert!(got > 0);
    bytes.truncate(got as usize);
    // SAFETY: the message that was received.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: it carries one descriptor.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: as above.
    let fd = unsafe { data.cast::<i32>().read_unaligned() };
    // SAFETY: made for us by the kernel.
    (bytes, unsafe { OwnedFd::from_raw_fd(fd) })
}
