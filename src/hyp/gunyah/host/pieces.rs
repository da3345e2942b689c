//! Ranges, cut so that a step is never about more than 2 MiB; and how many tables they may need at most.

use super::given::Given;
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::stage2::GuestRun;

/// Entries of a table, in bits.
const BITS: u32 = 9;
/// Levels below the root, the one of pages included.
const NR_LEVELS: usize = 3;

/// Part of what is given, within 2 MiB of a guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) gfn: Gfn,
    pub(super) pfn: Pfn,
    pub(super) nr: u64,
    /// Whether the guest may write.
    pub(super) writes: bool,
}

impl Piece {
    pub(super) fn size(self) -> u64 {
        self.nr * crate::geometry::PAGE_SIZE.get()
    }
}

fn cut(part: Given) -> impl Iterator<Item = Piece> {
    let GuestRun { gfn, pfn, nr_pages } = part.run;
    let mut nr_done = 0;
    std::iter::from_fn(move || {
        let (gfn, pfn) = (gfn.get() + nr_done, pfn.get() + nr_done);
        let nr = (HUGE_PAGES - gfn % HUGE_PAGES).min(nr_pages - nr_done);
        nr_done += nr;
        let (gfn, pfn) = (Gfn::new(gfn), Pfn::new(pfn));
        (nr > 0).then_some(Piece { gfn, pfn, nr, writes: part.writes })
    })
}

pub(super) fn pieces(parts: &[Given]) -> impl Iterator<Item = Piece> {
    parts.iter().flat_map(|&part| cut(part))
}

/// Tables behind the addresses of all parts, with an entry for each page: nothing that is done to them uses more.
pub(super) fn nr_tables(parts: &[Given]) -> u64 {
    let mut seen = [[None; NR_LEVELS]; 2];
    let mut nr = 0;
    for part in parts {
        let starts = [part.run.gfn.get(), part.run.pfn.get()];
        for (start, seen) in starts.into_iter().zip(&mut seen) {
            let last = start + part.run.nr_pages - 1;
            for (seen, level) in seen.iter_mut().zip(1..) {
                let (first, last) = (start >> (BITS * level), last >> (BITS * level));
                nr += last - first + u64::from(*seen != Some(first));
                *seen = Some(last);
            }
        }
    }
    nr
}

/// Checks runs as an object passes them: of some pages, within what can be numbered, none twice.
///
/// # Errors
/// `EINVAL`, `ENOMEM`.
pub(super) fn check(runs: &[GuestRun], gfn_limit: Gfn, pfn_limit: Pfn) -> Result<(), Errno> {
    let ends_by = |start: u64, nr, limit| start.checked_add(nr).is_some_and(|end| end <= limit);
    let fits = |run: &GuestRun| {
        run.nr_pages > 0
            && ends_by(run.gfn.get(), run.nr_pages, gfn_limit.get())
            && ends_by(run.pfn.get(), run.nr_pages, pfn_limit.get())
    };
    if !runs.iter().all(fits) {
        return Err(Errno::EINVAL);
    }
    if runs.len() < 2 {
        return Ok(());
    }
    let mut sorted: Vec<(u64, u64)> = Vec::new();
    sorted.try_reserve_exact(runs.len()).map_err(|_| Errno::ENOMEM)?;
    let starts: [fn(&GuestRun) -> u64; 2] = [|run| run.gfn.get(), |run| run.pfn.get()];
    for start in starts {
        sorted.clear();
        sorted.extend(runs.iter().map(|run| (start(run), run.nr_pages)));
        sorted.sort_unstable();
        if sorted.windows(2).any(|two| two[0].0 + two[0].1 > two[1].0) {
            return Err(Errno::EINVAL);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::given::Side;
    use super::*;

    fn part(gfn: u64, pfn: u64, nr_pages: u64) -> Given {
        let run = GuestRun { gfn: Gfn::new(gfn), pfn: Pfn::new(pfn), nr_pages };
        Given { run, side: Side::Lent, writes: true }
    }

    #[test]
    fn no_piece_is_more_than_a_block_of_the_guests() {
        let parts = [part(0x1f0, 7, 0x20), part(0x400, 0x1000, 0x600), part(0x3ff, 3, 1)];
        let cut: Vec<_> =
            pieces(&parts).map(|piece| (piece.gfn.get(), piece.pfn.get(), piece.nr)).collect();
        assert_eq!(
            cut,
            [
                (0x1f0, 7, 0x10),
                (0x200, 0x17, 0x10),
                (0x400, 0x1000, 0x200),
                (0x600, 0x1200, 0x200),
                (0x800, 0x1400, 0x200),
                (0x3ff, 3, 1)
            ]
        );
    }

    #[test]
    fn tables_are_counted_once_where_parts_follow_each_other() {
        // Three levels for either side.
        assert_eq!(nr_tables(&[part(0, 0, 1)]), 6);
        assert_eq!(nr_tables(&[part(0, 0, 1), part(1, 9, 1), part(2, 5, 1)]), 6);
        assert_eq!(nr_tables(&[part(0x1ff, 0, 2)]), 7);
        assert_eq!(nr_tables(&[part(0, 0, 1), part(0x200, 1, 1), part(0, 2, 1)]), 8);
        assert_eq!(nr_tables(&[part(0, 0, 1 << 18)]), 2 * (512 + 1 + 1));
    }
}
