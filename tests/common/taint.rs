//! Patterns by which an owner's bytes are known, wherever they turn up.

use gmem::GuestMemfd;
use gmem::addr::{Offset, Pgoff};
use gmem::error::{Error, ErrorKind};
use gmem::range::PgoffRange;

/// Nothing else looks like that.
const MAGIC: u64 = 0x7a17 << 48;

pub(crate) fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// A page full of what says whose it is, and which page.
fn page_of(owner: u64, page: u64) -> Vec<u8> {
    let word = MAGIC | (owner & 0xffff) << 32 | (page & 0xffff_ffff);
    word.to_ne_bytes().repeat(512)
}

/// Tries again for as long as somebody is at the pages who will leave by himself.
pub(crate) fn settled<T>(mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::Busy => std::thread::yield_now(),
            outcome => return outcome,
        }
    }
}

/// Writes the owner's pattern into every byte of shared pages.
pub(crate) fn write(memfd: &GuestMemfd, pages: PgoffRange, owner: u64) {
    for page in pages.iter() {
        settled(|| memfd.write(page.offset(), &page_of(owner, page.get()))).unwrap();
    }
}

/// Gives all of the pages frames, and sees to it that nobody's bytes are in there.
pub(crate) fn assert_nobodys(memfd: &GuestMemfd, pages: PgoffRange, what: &str) {
    settled(|| memfd.allocate(pages)).unwrap();
    let (zeroes, mut bytes) = ([0; 4096], [0; 4096]);
    for page in pages.iter() {
        settled(|| memfd.read(page.offset(), &mut bytes)).unwrap();
        assert!(bytes == zeroes, "{what}: page {page} has {}", describe(&bytes));
    }
}

/// Whether all of the pages are as [`write`] left them.
pub(crate) fn assert_owners(memfd: &GuestMemfd, pages: PgoffRange, owner: u64, what: &str) {
    let mut bytes = [0; 4096];
    for page in pages.iter() {
        settled(|| memfd.read(page.offset(), &mut bytes)).unwrap();
        let is_right = bytes[..] == page_of(owner, page.get());
        assert!(is_right, "{what}: page {page} of owner {owner} has {}", describe(&bytes));
    }
}

fn describe(bytes: &[u8; 4096]) -> String {
    let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
    let found = words.enumerate().find(|&(_, word)| word != 0);
    match found {
        None => String::from("zeroes"),
        Some((at, word)) if word >> 48 == MAGIC >> 48 => {
            format!("page {:#x} of owner {} at word {at}", word as u32, word >> 32 & 0xffff)
        }
        Some((at, word)) => format!("{word:#x} at word {at}"),
    }
}

pub(crate) fn at(page: u64) -> Offset {
    Offset::new(page << 12)
}
