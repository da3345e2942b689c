//! VMs that do anything, with any argument, as bytes say. The hypervisor and the resource manager answer, and the
//! rules hold after every step.
//!
//! | file | holds |
//! |---|---|
//! | `wire` | messages as bytes |
//! | `vms` | the VMs, which send what could work, or anything |
//! | `judge` | what a step may have changed, bytes included |
//! | `flaw` | mistakes that the code can be made to seem to make |

mod flaw;
pub(super) mod judge;
mod vms;
pub(super) mod wire;

pub(super) use flaw::Flaw;
pub(super) use vms::run;

/// Any bytes, as choices. When they are used up, every choice is the first.
#[derive(Debug)]
pub(super) struct Choices<'a>(pub(super) &'a [u8]);

/// Numbers that nobody should send, but for the smallest.
const ODD: [u64; 16] = [
    0,
    1,
    0x1000,
    0x1001,
    0x20_0000,
    1 << 36,
    1 << 44,
    (1 << 44) - 0x1000,
    (1 << 48) - 0x1000,
    1 << 48,
    1 << 63,
    i64::MAX as u64,
    u64::MAX >> 12,
    u64::MAX - 0xfff,
    u64::MAX - 1,
    u64::MAX,
];

impl Choices<'_> {
    pub(super) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    /// One of at most 256.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.byte()) % bound
    }

    pub(super) fn one_in(&mut self, nr: u64) -> bool {
        self.below(nr) + 1 == nr
    }

    pub(super) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.byte()) % all.len()]
    }

    /// Any number at all.
    pub(super) fn odd(&mut self) -> u64 {
        match usize::from(self.byte()) {
            nth @ ..192 => ODD[nth % ODD.len()],
            nth => u64::from_be_bytes([0; 8].map(|_: u8| self.byte())) >> (nth % 64),
        }
    }
}

/// Bytes for a seed.
pub(super) fn bytes(seed: u64, nr: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    };
    (0..nr).map(next).collect()
}
