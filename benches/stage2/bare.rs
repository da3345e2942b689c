//! The peer: page tables of four levels in plain arrays, and nothing around them.

const ENTRIES: usize = 512;
const LEVELS_ABOVE: [u32; 3] = [27, 18, 9];

/// Entries are the number of the next table, and in the last level what they are told to be.
pub(crate) struct BareTree(Vec<[u64; ENTRIES]>);

impl BareTree {
    /// Every table there that leads to these pages.
    pub(crate) fn new(pages: impl Iterator<Item = u64>) -> Self {
        let mut tree = Self(vec![[0; ENTRIES]]);
        for page in pages {
            let mut at = 0;
            for shift in LEVELS_ABOVE {
                let entry = (page >> shift) as usize % ENTRIES;
                if tree.0[at][entry] == 0 {
                    tree.0[at][entry] = tree.0.len() as u64;
                    tree.0.push([0; ENTRIES]);
                }
                at = tree.0[at][entry] as usize;
            }
        }
        tree
    }

    /// A bare walk: four loads, each of which says where the next is.
    #[inline]
    pub(crate) fn entry(&mut self, page: u64) -> &mut u64 {
        let mut at = 0;
        for shift in LEVELS_ABOVE {
            at = self.0[at][(page >> shift) as usize % ENTRIES] as usize;
        }
        &mut self.0[at][page as usize % ENTRIES]
    }
}
