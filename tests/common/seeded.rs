//! Bytes that are a function of a seed.

pub(crate) fn bytes(seed: u64, nr_bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    };
    (0..nr_bytes).map(next).collect()
}
