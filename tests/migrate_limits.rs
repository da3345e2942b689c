//! A folio that moves while the kernel gives no more mappings: whatever a view cannot be given back stays
//! hidden, and what it may still map is nobody's.

// UNSAFETY: maps until the kernel refuses.
#![expect(unsafe_code, reason = "the limit of mappings is reached by raw system calls")]

mod common;

use std::ptr;

use common::Capability;
use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, FolioPool, GuestMemfd, HostView, PartSpec, PrivatePlacement, SigbusHandler,
    Touch, Visibility, Zone, audit,
};

const FOLIO: u64 = 512;
const PAGE_BYTES: usize = 4096;
const MINE: u8 = 0xA5;
const OTHERS: u8 = 0x5E;

/// Almost as many mappings as the kernel gives: page after page of another protection.
struct Filler {
    base: *mut libc::c_void,
    len: usize,
    nr_done: usize,
}

impl Filler {
    fn new(most: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let len = 2 * most * PAGE_BYTES;
        // SAFETY: no address is asked for, so nothing is replaced.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let mut filler = Self { base, len, nr_done: 0 };
        while filler.protect(filler.nr_done, libc::PROT_READ) {
            filler.nr_done += 1;
        }
        filler
    }

    /// Gives two mappings back.
    fn less(&mut self) {
        self.nr_done -= 1;
        assert!(self.protect(self.nr_done, libc::PROT_NONE));
    }

    fn protect(&self, nr: usize, protection: i32) -> bool {
        let at = (1 + 2 * nr) * PAGE_BYTES;
        assert!(at < self.len, "the kernel knows no limit");
        // SAFETY: a page of the mapping above.
        unsafe { libc::mprotect(self.base.wrapping_byte_add(at), PAGE_BYTES, protection) == 0 }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and goes as a whole.
        assert_eq!(unsafe { libc::munmap(self.base, self.len) }, 0);
    }
}

/// One mapping.
struct Single(*mut libc::c_void);

impl Single {
    fn new() -> Option<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: no address is asked for, so nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), PAGE_BYTES, protection, flags, -1, 0) };
        (at != libc::MAP_FAILED).then(|| Self(at))
    }
}

impl Drop for Single {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and goes as a whole.
        assert_eq!(unsafe { libc::munmap(self.0, PAGE_BYTES) }, 0);
    }
}

fn at(page: u64) -> Offset {
    Offset::new(page << 12)
}

fn filled(pool: &FolioPool, zones: &[Zone], byte: u8) -> GuestMemfd {
    let builder = GuestMemfd::builder(ByteSize::from_mib(6)).initial(Visibility::Shared);
    let builder = builder.zones(zones).private_placement(PrivatePlacement::Refuse);
    let memfd = builder.create(pool).unwrap();
    for page in 0..3 * FOLIO {
        memfd.write(at(page), &[byte]).unwrap();
    }
    memfd
}

fn seen(view: &HostView) -> Touch {
    let handler = SigbusHandler::install().unwrap();
    view.touch(handler, at(FOLIO + 1), Access::Read).unwrap()
}

#[test]
fn a_view_that_cannot_be_put_back_shows_nobodys_memory() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .map(|text| text.trim().parse().unwrap())
        .unwrap();
    let (mut nr_refused, mut nr_astray) = (0, 0);
    for nr_singles in 0..24 {
        let part = |mib| PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(mib));
        // A folio more than is needed: one will be quarantined.
        let builder = FolioPool::builder().part(part(6), Zone::Normal).part(part(8), Zone::Movable);
        let pool = builder.create().unwrap();
        let memfd = filled(&pool, &[Zone::Normal, Zone::Movable], MINE);
        let views = [(); 2].map(|()| memfd.map_view().unwrap());
        assert_eq!(views.each_ref().map(seen), [Touch::Byte(MINE); 2]);

        // From too few mappings for anything to enough for all of it, one by one.
        let folio = PgoffRange::new(Pgoff::new(FOLIO), 1).unwrap();
        let mut singles = Vec::with_capacity(nr_singles);
        let mut filler = Filler::new(limit);
        (0..10).for_each(|_| filler.less());
        singles.extend((0..nr_singles).map_while(|_| Single::new()));
        let migration = memfd.migrate(folio, Zone::Movable).unwrap();
        drop(filler);
        drop(singles);

        nr_refused += migration.refused.len();
        let other = filled(&pool, &[Zone::Movable, Zone::Normal], OTHERS);
        for touch in views.each_ref().map(seen) {
            match touch {
                Touch::Byte(byte) => assert_eq!(byte, MINE, "with {nr_singles} fewer"),
                _ => nr_astray += 1,
            }
        }
        let mut byte = [0];
        memfd.read(at(FOLIO + 1), &mut byte).unwrap();
        assert_eq!(byte, [MINE]);
        drop(other);
        // The next move puts it right.
        let all = memfd.pages();
        memfd.migrate(all, Zone::Movable).unwrap();
        memfd.migrate(all, Zone::Normal).unwrap();
        let report = audit::check(&pool, &[&memfd]).to_string();
        println!(
            "{nr_singles}: {} refused, {nr_astray} hidden so far: {report}",
            migration.refused.len()
        );
        assert_eq!(views.each_ref().map(seen), [Touch::Byte(MINE); 2], "with {nr_singles} fewer");
    }
    assert!(nr_refused > 0 && nr_astray > 0, "{nr_refused} {nr_astray}: the limit was not met");
}
