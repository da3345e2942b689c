//! Lists of actions that fail, made short.

/// The actions without those that a failure does not need. All of them if none fails.
pub(in crate::oracle) fn without_the_needless<A: Clone>(
    actions: &[A],
    fails: impl Fn(&[A]) -> bool,
) -> Vec<A> {
    let mut kept = actions.to_vec();
    let mut chunk = if fails(&kept) { kept.len().div_ceil(2) } else { 0 };
    while chunk > 0 {
        let mut at = 0;
        while at < kept.len() {
            let end = kept.len().min(at + chunk);
            let mut fewer = kept.clone();
            fewer.drain(at..end);
            match fails(&fewer) {
                true => kept = fewer,
                false => at = end,
            }
        }
        chunk /= 2;
    }
    kept
}
