//! The vm-memory adapter, with virtio-queue and others over it as they are.

#[path = "common/arenas.rs"]
mod arenas;
mod common;
#[expect(dead_code, reason = "other tests change the other setting")]
#[path = "common/setting.rs"]
mod setting;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Capability, require};
use gmem::addr::{Access, ByteSize, Gfn, Offset, Pgoff};
use gmem::error::{ErrorKind, Found};
use gmem::range::PgoffRange;
use gmem::vm_memory::{AddressSpace, Slot, refusal};
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HostView, SigbusHandler, Touch, Visibility,
};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use setting::{NR_HUGEPAGES, Setting};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, MemoryRegionAddress, Permissions,
};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Where the guest sees the object.
const RAM: u64 = 0x8000_0000;

struct Guest {
    memfd: GuestMemfd,
    view: Arc<HostView>,
    space: AddressSpace,
}

fn guest(initial: Visibility) -> Option<Guest> {
    require(Capability::Uffd).then(|| guest_on(ArenaBacking::Memfd, initial))
}

fn guest_on(backing: ArenaBacking, initial: Visibility) -> Guest {
    guest_of(ByteSize::from_mib(4), backing, initial)
}

fn guest_of(size: ByteSize, backing: ArenaBacking, initial: Visibility) -> Guest {
    let pool = FolioPool::new(backing, size).unwrap();
    let memfd = GuestMemfd::builder(size).initial(initial).create(&pool).unwrap();
    let view = Arc::new(memfd.map_view().unwrap());
    let slot = Slot { gfn: Gfn::new(RAM / PAGE), view: view.clone(), pages: memfd.pages() };
    let space = AddressSpace::new("virtio-blk", [slot]).unwrap();
    Guest { memfd, view, space }
}

impl Guest {
    fn convert(
        &self,
        start: u64,
        nr_pages: u64,
        to: Visibility,
    ) -> Result<u64, gmem::error::Error> {
        let done = self.memfd.convert(pages(start, nr_pages), to, ContentPolicy::Preserve)?;
        Ok(done.changed_pages())
    }
}

fn pages(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// The guest address of a byte of the object.
fn at(offset: u64) -> GuestAddress {
    GuestAddress(RAM + offset)
}

/// What a conversion of the pages was refused with: where, how many pins, by whom.
fn busy(error: &gmem::error::Error) -> (u64, u32, String) {
    assert_eq!(error.kind(), ErrorKind::Busy);
    let culprit = error.culprit().unwrap();
    match &culprit.found {
        Found::Pinned { pins, owners } => (culprit.offset.get(), *pins, owners.join(",")),
        other => panic!("{other:?}"),
    }
}

/// The bounds that vhost and linux-loader put on what they are given.
fn takes_backend<S: GuestAddressSpace<M: GuestMemoryBackend> + Clone + Send + Sync>(_: &S) {}
fn takes_guard<T: Clone + std::ops::Deref<Target: GuestMemory> + Send + Sync>(_: &T) {}

#[test]
fn the_bounds_of_the_ecosystem_hold() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    takes_backend(&guest.space);
    takes_guard(&guest.space.memory());
    let memory = guest.space.memory();
    assert_eq!(memory.num_regions(), 1);
    assert_eq!(memory.last_addr(), at(4 * MIB - 1));
    assert!(memory.physical_memory().is_some());
}

#[test]
fn a_slice_pins_its_pages_until_the_last_clone_of_the_guard_is_gone() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let memory = guest.space.memory();
    assert_eq!(memory.pinned(), ByteSize::from_bytes(0));
    let slice = memory.get_slice(at(2 * PAGE + 100), 5000).unwrap();
    slice.copy_from(b"request");
    assert_eq!(memory.pinned(), ByteSize::from_pages(2));
    // Again, and overlapping: each page is pinned once.
    memory.get_slice(at(PAGE), 3 * PAGE as usize).unwrap();
    assert_eq!(memory.pinned(), ByteSize::from_pages(3));
    let refused = guest.convert(0, 8, Visibility::Private).unwrap_err();
    assert_eq!(busy(&refused), (PAGE, 1, "virtio-blk".to_owned()));
    assert!(refused.to_string().contains("subpage 0x1000 has 1 pin (virtio-blk)"), "{refused}");
    // All others can be converted.
    assert_eq!(guest.convert(0, 1, Visibility::Private).unwrap(), 1);
    assert_eq!(guest.convert(4, 100, Visibility::Private).unwrap(), 100);

    let clone = memory.clone();
    drop(memory);
    assert!(guest.convert(1, 1, Visibility::Private).is_err());
    drop(clone);
    assert_eq!(guest.convert(0, 8, Visibility::Private).unwrap(), 3);
    assert_eq!(guest.memfd.stat().pinned, ByteSize::from_bytes(0));
}

#[test]
fn two_guards_and_two_devices_hold_pins_of_their_own() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let net = guest.space.for_owner("virtio-net").unwrap();
    let (first, second) = (guest.space.memory(), net.memory());
    first.get_slice(at(0), 1).unwrap();
    second.get_slice(at(0), 1).unwrap();
    let refused = guest.convert(0, 1, Visibility::Private).unwrap_err();
    assert_eq!(busy(&refused), (0, 2, "virtio-blk,virtio-net".to_owned()));
    drop(first);
    let refused = guest.convert(0, 1, Visibility::Private).unwrap_err();
    assert_eq!(busy(&refused), (0, 1, "virtio-net".to_owned()));
}

#[test]
fn private_memory_is_refused_with_the_reason() {
    let Some(guest) = guest(Visibility::Private) else { return };
    guest.convert(0, 4, Visibility::Shared).unwrap();
    let memory = guest.space.memory();
    let error = memory.get_slice(at(4 * PAGE), 16).unwrap_err();
    let why = refusal(&error).expect("the reason comes with it");
    assert_eq!(why.kind(), ErrorKind::NotShared);
    assert_eq!(why.culprit().unwrap().offset, Offset::new(4 * PAGE));
    assert!(matches!(error, GuestMemoryError::IOError(_)));
    // In part is not at all, and pins nothing.
    assert!(memory.get_slice(at(3 * PAGE), 2 * PAGE as usize).is_err());
    let mut slices = GuestMemoryBackend::get_slices(&*memory, at(3 * PAGE), 2 * PAGE as usize);
    assert!(slices.next().unwrap().is_err() && slices.next().is_none());
    assert!(!GuestMemoryBackend::check_range(&*memory, at(3 * PAGE), PAGE as usize + 1));
    assert_eq!(memory.pinned(), ByteSize::from_bytes(0));
    assert!(GuestMemory::check_range(&*memory, at(0), 4 * PAGE as usize, Permissions::Write));
    // Outside of guest memory there is nothing, and that is another error.
    let error = memory.get_slice(GuestAddress(RAM - 1), 1).unwrap_err();
    assert!(matches!(error, GuestMemoryError::InvalidGuestAddress(_)));
    let error = memory.get_slice(at(0), usize::MAX).unwrap_err();
    assert!(matches!(error, GuestMemoryError::InvalidBackendAddress));
    assert!(refusal(&error).is_none());
}

#[test]
fn a_write_across_the_border_changes_nothing() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    guest.view.write(Offset::new(0), &[7; 4096]).unwrap();
    guest.convert(1, 1, Visibility::Private).unwrap();
    let memory = guest.space.memory();
    let data = [9; 200];
    assert!(memory.write(&data, at(PAGE - 100)).is_err());
    assert!(memory.write_slice(&data, at(PAGE - 100)).is_err());
    assert!(memory.read_volatile_from(at(PAGE - 100), &mut &data[..], 200).is_err());
    assert!(memory.store(9_u64, at(PAGE), Ordering::Relaxed).is_err());
    let region = memory.find_region(at(0)).unwrap();
    assert!(region.write(&data, MemoryRegionAddress(PAGE - 100)).is_err());
    let mut page = [0; 4096];
    guest.view.read(Offset::new(0), &mut page).unwrap();
    assert_eq!(page, [7; 4096]);
}

#[test]
fn what_is_written_by_guest_address_is_read_by_every_other_way() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let memory = guest.space.memory();
    memory.write_obj(0x1122_3344_5566_7788_u64, at(PAGE + 8)).unwrap();
    assert_eq!(guest.view.load_u64(Offset::new(PAGE + 8)).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(memory.load::<u16>(at(PAGE + 8), Ordering::Acquire).unwrap(), 0x7788);
    memory.store(0xabcd_u16, at(PAGE + 10), Ordering::Release).unwrap();
    assert_eq!(memory.read_obj::<u32>(at(PAGE + 8)).unwrap(), 0xabcd_7788);
    // Misaligned atomics are an error, not undefined behaviour.
    assert!(memory.load::<u64>(at(PAGE + 12), Ordering::Relaxed).is_err());
    let mut out = Vec::new();
    memory.write_all_volatile_to(at(PAGE + 8), &mut out, 4).unwrap();
    assert_eq!(out, [0x88, 0x77, 0xcd, 0xab]);
}

#[test]
fn the_accesses_of_a_region_end_where_it_ends_and_pin_nothing() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let memory = guest.space.memory();
    let region = memory.find_region(at(0)).unwrap();
    let last = MemoryRegionAddress(4 * MIB - 4);
    assert_eq!(region.write(&[1; 10], last).unwrap(), 4);
    let mut buf = [0; 10];
    assert_eq!(region.read(&mut buf, last).unwrap(), 4);
    assert_eq!(buf, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]);
    let partial = region.write_slice(&[1; 10], last).unwrap_err();
    assert!(matches!(partial, GuestMemoryError::PartialBuffer { expected: 10, completed: 4 }));
    assert!(region.read_slice(&mut buf, last).is_err());
    for outside in [4 * MIB, u64::MAX] {
        assert!(region.write(&[1], MemoryRegionAddress(outside)).is_err());
        assert!(region.read(&mut buf, MemoryRegionAddress(outside)).is_err());
        assert_eq!(region.write(&[], MemoryRegionAddress(outside)).unwrap(), 0);
    }
    assert_eq!(memory.pinned(), ByteSize::from_bytes(0));

    let source = [5; 64];
    assert_eq!(region.read_volatile_from(last, &mut &source[..], 64).unwrap(), 4);
    assert!(region.read_exact_volatile_from(last, &mut &source[..], 64).is_err());
    let mut target = Vec::new();
    assert_eq!(region.write_volatile_to(last, &mut target, 64).unwrap(), 4);
    assert_eq!(target, [5; 4]);
    region.store(3_u32, last, Ordering::SeqCst).unwrap();
    assert_eq!(region.load::<u32>(last, Ordering::SeqCst).unwrap(), 3);
    assert_eq!(memory.pinned(), ByteSize::from_pages(1));
    assert!(region.as_volatile_slice().is_ok());
    assert_eq!(memory.pinned(), ByteSize::from_mib(4));
}

#[test]
fn empty_slices_hold_nothing() {
    let Some(guest) = guest(Visibility::Private) else { return };
    let memory = guest.space.memory();
    assert_eq!(memory.get_slice(at(0), 0).unwrap().len(), 0);
    assert_eq!(memory.pinned(), ByteSize::from_bytes(0));
}

#[test]
fn a_slice_of_shared_memory_that_was_punched_can_be_touched() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    guest.memfd.punch_hole(guest.memfd.pages()).unwrap();
    assert_eq!(guest.memfd.stat().resident, ByteSize::from_bytes(0));
    let memory = guest.space.memory();
    memory.get_slice(at(MIB), 8).unwrap().copy_from(b"not dead");
    let mut read = [0; 8];
    guest.view.read(Offset::new(MIB), &mut read).unwrap();
    assert_eq!(&read, b"not dead");
    assert!(guest.memfd.punch_hole(guest.memfd.pages()).is_err(), "the guard has it pinned");
}

/// Shared, there, and not in the view, because the host has no memory for what somebody has taken.
#[test]
fn a_slice_of_what_the_view_cannot_show_is_refused_until_it_can() {
    if !require(Capability::Uffd) || !require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "3");
    // A size of its own: that is how the file is found.
    let size = ByteSize::from_mib(6);
    let guest = guest_of(size, ArenaBacking::MemfdHugetlb2M, Visibility::Shared);
    guest.memfd.write(Offset::new(0), &[7; 6 << 20]).unwrap();
    let [arena] = &arenas::of_size(6 << 20)[..] else { panic!("one pool, one file") };
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(arena, hole, 0, 2 << 20).unwrap();
    let thief = memfd_create("thief", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    ftruncate(&thief, 2 << 20).unwrap();
    fallocate(&thief, FallocateFlags::KEEP_SIZE, 0, 2 << 20).unwrap();
    guest.convert(3, 1, Visibility::Private).unwrap();
    guest.convert(3, 1, Visibility::Shared).unwrap();
    let memory = guest.space.memory();
    for _ in 0..2 {
        let error = memory.get_slice(at(PAGE), 8).unwrap_err();
        assert_eq!(refusal(&error).map(|it| it.kind()), Some(ErrorKind::NotFound), "{error}");
        assert_eq!(memory.pinned(), ByteSize::from_bytes(0));
    }
    memory.get_slice(at(2 * MIB), 8).unwrap().copy_from(b"not dead");
    drop(thief);
    memory.get_slice(at(PAGE), 8).unwrap().copy_from(b"back now");
    let mut read = [0; 8];
    guest.memfd.read(Offset::new(PAGE), &mut read).unwrap();
    assert_eq!(&read, b"back now");
}

#[test]
fn an_address_that_outlives_its_pins_faults_on_private_memory() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let memory = guest.space.memory();
    let pointer = memory.get_host_address(at(PAGE)).unwrap();
    assert_eq!(memory.pinned(), ByteSize::from_bytes(0));
    assert_eq!(pointer.addr(), guest.view.hva_of(Offset::new(PAGE)).unwrap().get());
    let slice = memory.get_slice(at(PAGE), 1).unwrap();
    assert_eq!(slice.ptr_guard().as_ptr().addr(), pointer.addr());
    drop(memory);
    guest.convert(1, 1, Visibility::Private).unwrap();
    let handler = SigbusHandler::install().unwrap();
    let touch = guest.view.touch(handler, Offset::new(PAGE), Access::Read).unwrap();
    assert!(matches!(touch, Touch::Fault(fault) if fault.hva.get() == pointer.addr()));
}

#[test]
fn slots_must_fit_together() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let slot = |gfn, start, nr_pages| Slot {
        gfn: Gfn::new(gfn),
        view: guest.view.clone(),
        pages: pages(start, nr_pages),
    };
    let kind = |slots: Vec<Slot>| AddressSpace::new("d", slots).map_err(|e| e.kind()).err();
    assert_eq!(kind(vec![]), Some(ErrorKind::EmptyRange));
    assert_eq!(kind(vec![slot(0, 1020, 8)]), Some(ErrorKind::OutOfRange));
    assert_eq!(kind(vec![slot(u64::MAX, 0, 8)]), Some(ErrorKind::Overflow));
    assert_eq!(kind(vec![slot(16, 0, 8), slot(9, 8, 8)]), Some(ErrorKind::Exists));
    assert_eq!(kind(vec![slot(16, 0, 8), slot(8, 8, 8)]), None);
}

#[test]
fn accesses_cross_slots_and_say_how_far_they_came() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let slot =
        |gfn, start| Slot { gfn: Gfn::new(gfn), view: guest.view.clone(), pages: pages(start, 1) };
    // Neighbours in the guest, far apart in the object, and given in the wrong order.
    let space = AddressSpace::new("d", [slot(1, 7), slot(0, 100)]).unwrap();
    let memory = space.memory();
    memory.write_slice(&[1, 2, 3, 4], GuestAddress(PAGE - 2)).unwrap();
    let mut read = [0; 2];
    guest.view.read(Offset::new(101 * PAGE - 2), &mut read).unwrap();
    assert_eq!(read, [1, 2]);
    guest.view.read(Offset::new(7 * PAGE), &mut read).unwrap();
    assert_eq!(read, [3, 4]);
    drop(memory);
    guest.convert(7, 1, Visibility::Private).unwrap();
    let memory = space.memory();
    assert_eq!(memory.write(&[5, 6, 7, 8], GuestAddress(PAGE - 2)).unwrap(), 2);
    assert!(memory.write_slice(&[5, 6, 7, 8], GuestAddress(PAGE - 2)).is_err());
}

/// Where the parts of the test's queue are.
const DESC_TABLE: u64 = RAM;
const AVAIL_RING: u64 = RAM + PAGE;
const USED_RING: u64 = RAM + 2 * PAGE;
const BUFFER: u64 = 16 * PAGE;

/// A queue with one chain: eight bytes for the device to read, eight to write.
fn queue_with_a_chain(guest: &Guest) -> Queue {
    let memory = guest.space.memory();
    // VRING_DESC_F_NEXT, VRING_DESC_F_WRITE.
    let chain =
        [Descriptor::new(at(BUFFER).0, 8, 1, 1), Descriptor::new(at(BUFFER + 2 * PAGE).0, 8, 2, 0)];
    for (i, descriptor) in (0..).zip(chain) {
        let raw = (
            descriptor.addr().0,
            u64::from(descriptor.len())
                | u64::from(descriptor.flags()) << 32
                | u64::from(descriptor.next()) << 48,
        );
        memory.write_obj(raw.0, GuestAddress(DESC_TABLE + i * 16)).unwrap();
        memory.write_obj(raw.1, GuestAddress(DESC_TABLE + i * 16 + 8)).unwrap();
    }
    memory.write_slice(b"question", at(BUFFER)).unwrap();
    memory.write_obj([0_u16, 1, 0].map(u16::to_le), GuestAddress(AVAIL_RING)).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.set_desc_table_address(Some(DESC_TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL_RING as u32), Some(0));
    queue.set_used_ring_address(Some(USED_RING as u32), Some(0));
    queue.set_ready(true);
    queue
}

#[test]
fn virtio_queue_works_unchanged() {
    use std::io::{Read, Write};

    let Some(guest) = guest(Visibility::Shared) else { return };
    let mut queue = queue_with_a_chain(&guest);
    let memory = guest.space.memory();
    assert!(queue.is_valid(&*memory));
    let chain = queue.pop_descriptor_chain(memory.clone()).expect("a chain is available");
    let head = chain.head_index();
    let mut question = [0; 8];
    let mut reader = Reader::new(&*memory, chain.clone()).unwrap();
    reader.read_exact(&mut question).unwrap();
    assert_eq!(&question, b"question");
    let mut writer = Writer::new(&*memory, chain).unwrap();
    writer.write_all(b"answered").unwrap();

    // The request is in flight: its buffers and its rings stay, its neighbours may go.
    let refused = guest.convert(15, 16, Visibility::Private).unwrap_err();
    assert_eq!(busy(&refused), (BUFFER, 1, "virtio-blk".to_owned()));
    assert!(guest.convert(0, 1, Visibility::Private).is_err());
    guest.convert(17, 1, Visibility::Private).unwrap();

    queue.add_used(&*memory, head, 8).unwrap();
    assert!(queue.needs_notification(&*memory).unwrap());
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED_RING + 2)).unwrap(), 1);
    assert!(queue.pop_descriptor_chain(memory.clone()).is_none());
    drop(memory);
    guest.convert(0, 32, Visibility::Private).unwrap();
    let mut answer = [0; 8];
    guest.convert(18, 1, Visibility::Shared).unwrap();
    guest.view.read(Offset::new(BUFFER + 2 * PAGE), &mut answer).unwrap();
    assert_eq!(&answer, b"answered");
}

#[test]
fn a_queue_in_private_memory_is_not_valid() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let mut queue = queue_with_a_chain(&guest);
    for page in 0..3 {
        guest.convert(page, 1, Visibility::Private).unwrap();
        assert!(!queue.is_valid(&*guest.space.memory()), "page {page}");
        guest.convert(page, 1, Visibility::Shared).unwrap();
    }
    assert!(queue.is_valid(&*guest.space.memory()));
    // Turned private behind the device's back: an error, and the device goes on afterwards.
    guest.convert(1, 1, Visibility::Private).unwrap();
    assert!(queue.iter(guest.space.memory()).is_err());
    guest.convert(1, 1, Visibility::Shared).unwrap();
    assert!(queue.iter(guest.space.memory()).unwrap().next().is_some());
}

#[test]
fn a_descriptor_that_points_at_private_memory_fails_alone() {
    let Some(guest) = guest(Visibility::Shared) else { return };
    let mut queue = queue_with_a_chain(&guest);
    guest.convert(BUFFER / PAGE + 2, 1, Visibility::Private).unwrap();
    let memory = guest.space.memory();
    let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
    assert!(Reader::new(&*memory, chain.clone()).is_ok());
    match Writer::new(&*memory, chain).map(|_| ()).unwrap_err() {
        virtio_queue::Error::GuestMemoryError(error) => {
            assert_eq!(refusal(&error).unwrap().kind(), ErrorKind::NotShared);
        }
        other => panic!("{other}"),
    }
}

/// Whoever else fills a hole, a slice of it can be touched: also while he has not got to it in the view.
#[test]
fn a_slice_of_a_page_that_is_just_being_filled_can_be_touched() {
    if !require(Capability::Uffd) {
        return;
    }
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(2)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    let view = Arc::new(memfd.map_view().unwrap());
    let slot = Slot { gfn: Gfn::new(0), view, pages: memfd.pages() };
    let space = AddressSpace::new("virtio-blk", [slot]).unwrap();
    let holes = PgoffRange::new(Pgoff::new(1), 511).unwrap();
    std::thread::scope(|scope| {
        let filler = scope.spawn(|| {
            for _ in 0..500 {
                // Refused while the slice is there.
                let _ = memfd.punch_hole(holes);
                memfd.allocate(holes).unwrap();
            }
        });
        while !filler.is_finished() {
            let memory = space.memory();
            let slice = memory.get_slice(GuestAddress(511 * PAGE), 8).unwrap();
            slice.copy_from(&[7_u8; 8]);
            drop(memory);
            std::thread::yield_now();
        }
    });
    assert_eq!(gmem::audit::check(&pool, &[&memfd]).to_string(), "clean");
}
