//! Over how many pages a lock was held at once: what tests ask, so that no operation holds one by how much memory it is
//! about.

#[cfg(test)]
thread_local! {
    static LONGEST: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// A lock that others may wait for is held while so many pages are looked at, moved or cleared.
#[inline(always)]
pub(crate) fn held_over(nr_pages: u64) {
    #[cfg(test)]
    LONGEST.set(LONGEST.get().max(nr_pages));
    #[cfg(not(test))]
    let _ = nr_pages;
}

/// The most of this thread since this was last asked.
#[cfg(test)]
pub(crate) fn longest() -> u64 {
    LONGEST.replace(0)
}
