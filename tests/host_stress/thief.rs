//! Somebody who opens the arena's file from outside and takes pages out of it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use gmem::ArenaBacking;
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::io::Errno;

use super::setting::NR_HUGEPAGES;
use super::{NR_PAGES, PAGE, Random, byte_at};

/// Which pages have gone, and which may.
pub(crate) struct Taken {
    unit: u64,
    /// How many pages lose their entries in views with one that goes: the kernel splits a transparent huge page
    /// for it, and unmaps it as a whole.
    reach: u64,
    gone: Vec<AtomicBool>,
    pub(crate) nr_thefts: AtomicU64,
}

impl Taken {
    pub(crate) fn new(backing: ArenaBacking) -> Self {
        let unit = if backing == ArenaBacking::MemfdHugetlb2M { 512 } else { 1 };
        let gone = (0..NR_PAGES).map(|_| AtomicBool::new(false)).collect();
        let reach = if backing == ArenaBacking::Memfd { 1 } else { 512 };
        Self { unit, reach, gone, nr_thefts: AtomicU64::new(0) }
    }

    /// The bytes of this page may be zeroes, or have no memory.
    pub(crate) fn is(&self, page: u64) -> bool {
        self.gone[page as usize].load(Ordering::SeqCst)
    }

    /// The page may have no entry in a view although it is shared.
    pub(crate) fn may_fault(&self, page: u64) -> bool {
        let start = page / self.reach * self.reach;
        (start..start + self.reach).any(|page| self.is(page))
    }

    /// Most pages are nobody's to take.
    fn may_be(&self, page: u64) -> bool {
        match self.unit {
            1 => page % 8 == 3,
            _ => page / self.unit == NR_PAGES / self.unit - 1,
        }
    }

    fn take(&self, page: u64) {
        for page in page..page + self.unit {
            self.gone[page as usize].store(true, Ordering::SeqCst);
        }
    }
}

/// The file of the arena, by the way that anybody has who may look at the process, and where in it the pages
/// are that may be taken.
pub(crate) struct Thief {
    file: File,
    len: u64,
    places: Vec<(u64, u64)>,
}

impl Thief {
    /// Finds the pages by what is written in them.
    pub(crate) fn new(taken: &Taken) -> Self {
        let fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let is_arena = |path: &std::path::PathBuf| {
            fs::read_link(path).is_ok_and(|name| name.to_string_lossy().contains("gmem-arena"))
        };
        let path = fds.map(|fd| fd.path()).find(is_arena).expect("the file of the arena");
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let step = taken.unit * PAGE;
        let first_bytes =
            |page: u64| (0..16).map(|at| byte_at(page * PAGE + at)).collect::<Vec<_>>();
        let pages: Vec<_> = (0..NR_PAGES).map(|page| (page, first_bytes(page))).collect();
        let mut places = Vec::new();
        for at in (0..len).step_by(step as usize) {
            let mut found = [0; 16];
            file.read_exact_at(&mut found, at).unwrap();
            let page = pages.iter().find(|(_, bytes)| *bytes == found).map(|(page, _)| *page);
            places.extend(page.filter(|&page| taken.may_be(page)).map(|page| (page, at)));
        }
        assert_eq!(
            places.len() as u64 * taken.unit,
            (0..NR_PAGES).filter(|&page| taken.may_be(page)).count() as u64
        );
        Self { file, len, places }
    }

    fn takes(&self, taken: &Taken, nth: usize) {
        let (page, at) = self.places[nth];
        // First, so that nobody is surprised.
        taken.take(page);
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, how, at, taken.unit * PAGE).unwrap();
        taken.nr_thefts.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes something that cannot be had again meanwhile.
    pub(crate) fn takes_for_good(&self, taken: &Taken) -> KeptBack {
        self.takes(taken, 0);
        KeptBack::one()
    }

    /// Takes one thing after the other. What cannot be had is refused each time.
    pub(crate) fn steals(&self, taken: &Taken, is_over: impl Fn() -> bool) {
        let mut random = Random::new(0x7e1f);
        while !is_over() {
            for len in [0, self.len - taken.unit * PAGE, self.len + taken.unit * PAGE] {
                assert_eq!(ftruncate(&self.file, len), Err(Errno::PERM));
            }
            self.takes(taken, random.below(self.places.len() as u64) as usize);
            if taken.unit > 1 {
                let kept_back = KeptBack::one();
                thread::sleep(Duration::from_millis(random.below(30)));
                drop(kept_back);
            }
            thread::sleep(Duration::from_millis(2 + random.below(10)));
        }
    }
}

/// The huge page that has come free goes from the host's pool as well, until this is dropped.
pub(crate) struct KeptBack(String);

impl KeptBack {
    fn one() -> Self {
        let before = fs::read_to_string(NR_HUGEPAGES).unwrap();
        let less = before.trim().parse::<u64>().unwrap() - 1;
        fs::write(NR_HUGEPAGES, less.to_string()).unwrap();
        Self(before)
    }
}

impl Drop for KeptBack {
    fn drop(&mut self) {
        fs::write(NR_HUGEPAGES, self.0.trim()).unwrap();
    }
}
