//! What the example's last line has to say.

use super::{Bytes, Guest, Hypervisor};
use crate::json::{Object, Value, parse_object};

/// A run that could not begin still has every key, and says why.
pub(super) fn judge_refusal(line: &str, words: &str) -> Result<(), String> {
    let object = parse_object(line)?;
    expect(&object, "sha256_match", &Value::Bool(false))?;
    expect(&object, "ok", &Value::Bool(false))?;
    expect(&object, "bytes", &Value::Number(0.0))?;
    match object.get("error") {
        Some(Value::Text(error)) if error.contains(words) => Ok(()),
        other => Err(format!("error is {other:?}, without `{words}`")),
    }
}

/// Everything that the example promises was tried, and came out as it should.
pub(super) fn judge_line(
    line: &str,
    (hypervisor, guest): (Hypervisor, Guest),
    bytes: Bytes,
) -> Result<(), String> {
    let object = parse_object(line)?;
    expect(&object, "sha256_match", &Value::Bool(true))?;
    expect(&object, "audit", &Value::Text("clean".into()))?;
    expect(&object, "leaked_frames", &Value::Number(0.0))?;
    expect(&object, "ok", &Value::Bool(true))?;
    expect(&object, "guest", &Value::Text(guest.name().into()))?;
    expect(&object, "hypervisor", &Value::Text(hypervisor.name().into()))?;
    let read = number(&object, "bytes")?;
    match bytes {
        Bytes::Exactly(wanted) if read != wanted as f64 => {
            return Err(format!("bytes is {read}, not {wanted}"));
        }
        Bytes::Some if read <= 0.0 => return Err("bytes is 0".into()),
        _ => {}
    }
    let of_private = &["sigbus", "reads_refused", "conversions", "signals", "efault"][..];
    let of_open = &["private_refused", "open_touches"][..];
    let (tried, does_not_apply) = match guest {
        Guest::Protected => (of_private, of_open),
        Guest::NonProtected => (of_open, of_private),
    };
    for key in tried.iter().chain(&["busy_refused", "bad_descriptors"]) {
        expect_some(&object, key)?;
    }
    for key in does_not_apply {
        expect(&object, key, &Value::Number(0.0))?;
    }
    let (destroys, _) = hypervisor.loses();
    expect(&object, "poisoned_exits", &once(destroys && guest == Guest::Protected))?;
    judge_incidents(object_at(&object, "incidents")?, hypervisor, guest)
}

fn once(seen: bool) -> Value {
    Value::Number(f64::from(u8::from(seen)))
}

/// The hazard and the rescue are shown to a protected guest, once each, and nothing else goes wrong.
fn judge_incidents(incidents: &Object, hypervisor: Hypervisor, guest: Guest) -> Result<(), String> {
    let caused = object_at(incidents, "caused")?;
    let shown = guest == Guest::Protected;
    let (destroys, dma) = hypervisor.loses();
    expect(caused, "destroyed", &once(shown && destroys))?;
    expect(caused, "dma_into_private", &once(shown && dma))?;
    // Where the page is not destroyed, the kernel dies.
    expect(caused, "oopses", &once(shown && !destroys))?;
    for key in ["stuck", "orphaned"] {
        expect(caused, key, &Value::Number(0.0))?;
    }
    let prevented = object_at(incidents, "prevented")?;
    expect_some(prevented, "conversions")?;
    for key in ["accesses", "pins"] {
        match guest {
            Guest::Protected => expect_some(prevented, key)?,
            Guest::NonProtected => expect(prevented, key, &Value::Number(0.0))?,
        }
    }
    Ok(())
}

fn expect(object: &Object, key: &str, wanted: &Value) -> Result<(), String> {
    match object.get(key) {
        Some(found) if found == wanted => Ok(()),
        Some(found) => Err(format!("{key} is {found:?}, not {wanted:?}")),
        None => Err(format!("the JSON has no key {key}")),
    }
}

fn number(object: &Object, key: &str) -> Result<f64, String> {
    match object.get(key) {
        Some(Value::Number(number)) => Ok(*number),
        Some(found) => Err(format!("{key} is {found:?}, not a number")),
        None => Err(format!("the JSON has no key {key}")),
    }
}

/// That something was tried at least once.
fn expect_some(object: &Object, key: &str) -> Result<(), String> {
    match number(object, key)? {
        seen if seen > 0.0 => Ok(()),
        seen => Err(format!("{key} is {seen}: the example did not try that")),
    }
}

fn object_at<'a>(object: &'a Object, key: &str) -> Result<&'a Object, String> {
    match object.get(key) {
        Some(Value::Object(found)) => Ok(found),
        Some(found) => Err(format!("{key} is {found:?}, not an object")),
        None => Err(format!("the JSON has no key {key}")),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    const GOOD: &str = r#"{"sha256_match":true,"bytes":12,"sigbus":1,"busy_refused":2,
        "bad_descriptors":2,"conversions":9,"audit":"clean","leaked_frames":0,"ok":true,
        "guest":"protected","hypervisor":"pkvm","incidents":{"caused":{"destroyed":1,"dma_into_private":1,
        "oopses":0,"stuck":0,"orphaned":0},"prevented":{"accesses":4,"pins":3,
        "conversions":2}},"reads_refused":5,"private_refused":0,"open_touches":0,
        "signals":1,"efault":1,"poisoned_exits":1}"#;
    const OPEN: &str = r#"{"sha256_match":true,"bytes":12,"sigbus":0,"busy_refused":2,
        "bad_descriptors":2,"conversions":0,"audit":"clean","leaked_frames":0,"ok":true,
        "guest":"non-protected","hypervisor":"pkvm","incidents":{"caused":{"destroyed":0,"dma_into_private":0,
        "oopses":0,"stuck":0,"orphaned":0},"prevented":{"accesses":0,"pins":0,
        "conversions":2}},"reads_refused":0,"private_refused":1,"open_touches":4,
        "signals":0,"efault":0,"poisoned_exits":0}"#;

    fn judged(line: &str, bytes: Bytes) -> Result<(), String> {
        judge_line(line, (Hypervisor::Pkvm, Guest::Protected), bytes)
    }

    #[test]
    fn a_good_line_passes() {
        assert_eq!(judged(GOOD, Bytes::Exactly(12)), Ok(()));
        assert_eq!(judged(GOOD, Bytes::Some), Ok(()));
        let empty = GOOD.replace("\"bytes\":12", "\"bytes\":0");
        assert_eq!(judged(&empty, Bytes::Exactly(0)), Ok(()));
        assert_eq!(
            judge_line(OPEN, (Hypervisor::Pkvm, Guest::NonProtected), Bytes::Exactly(12)),
            Ok(())
        );
    }

    #[test]
    fn one_kind_of_guest_does_not_pass_for_the_other() {
        assert!(judge_line(GOOD, (Hypervisor::Pkvm, Guest::NonProtected), Bytes::Some).is_err());
        assert!(judge_line(OPEN, (Hypervisor::Pkvm, Guest::Protected), Bytes::Some).is_err());
    }

    /// Where nothing is destroyed the kernel dies, and devices are stopped.
    #[test]
    fn each_hypervisor_has_its_own_end() {
        let dies = [
            ("\"hypervisor\":\"pkvm\"", "\"hypervisor\":\"gunyah\""),
            ("\"destroyed\":1", "\"destroyed\":0"),
            ("\"dma_into_private\":1", "\"dma_into_private\":0"),
            ("\"oopses\":0", "\"oopses\":1"),
            ("\"poisoned_exits\":1", "\"poisoned_exits\":0"),
        ];
        let gunyah = (Hypervisor::Gunyah, Guest::Protected);
        let line = dies.iter().fold(GOOD.to_owned(), |line, (from, to)| line.replace(from, to));
        assert_eq!(judge_line(&line, gunyah, Bytes::Some), Ok(()));
        for (from, to) in dies {
            let bad = line.replace(to, from);
            assert!(judge_line(&bad, gunyah, Bytes::Some).is_err(), "{to} -> {from} passed");
        }
        assert!(judged(&line, Bytes::Some).is_err());
    }

    #[test]
    fn a_refusal_has_to_say_why() {
        let line = r#"{"sha256_match":false,"bytes":0,"ok":false,"error":"x: is a directory"}"#;
        assert_eq!(judge_refusal(line, "is a directory"), Ok(()));
        assert!(judge_refusal(line, "No such file").is_err());
        assert!(judge_refusal(GOOD, "").is_err());
    }

    fn each_fails(good: &str, guest: Guest, spoilt: &[(&str, &str)]) {
        for (from, to) in spoilt {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            let judged = judge_line(&bad, (Hypervisor::Pkvm, guest), Bytes::Exactly(12));
            assert!(judged.is_err(), "{from} -> {to} passed");
        }
    }

    #[test]
    fn each_promise_is_looked_at() {
        let spoilt = [
            ("true", "false"),
            ("\"hypervisor\":\"pkvm\"", "\"hypervisor\":\"gunyah\""),
            ("\"ok\":true", "\"ok\":false"),
            ("\"bytes\":12", "\"bytes\":11"),
            ("\"sigbus\":1", "\"sigbus\":0"),
            ("\"busy_refused\":2", "\"busy_refused\":0"),
            ("\"bad_descriptors\":2,", ""),
            ("\"conversions\":9", "\"conversions\":\"9\""),
            ("clean", "dirty"),
            ("\"leaked_frames\":0", "\"leaked_frames\":1"),
            ("\"open_touches\":0", "\"open_touches\":1"),
            ("\"signals\":1", "\"signals\":0"),
            ("\"efault\":1", "\"efault\":0"),
            ("\"poisoned_exits\":1", "\"poisoned_exits\":0"),
            ("\"destroyed\":1", "\"destroyed\":0"),
            ("\"destroyed\":1", "\"destroyed\":2"),
            ("\"dma_into_private\":1", "\"dma_into_private\":2"),
            ("\"oopses\":0", "\"oopses\":1"),
            ("\"accesses\":4", "\"accesses\":0"),
            ("\"pins\":3,", ""),
            ("\"conversions\":2", "\"conversions\":0"),
            ("\"caused\":{", "\"cost\":{"),
        ];
        each_fails(GOOD, Guest::Protected, &spoilt);
        let spoilt = [
            ("\"sigbus\":0", "\"sigbus\":1"),
            ("\"conversions\":0", "\"conversions\":1"),
            ("\"private_refused\":1", "\"private_refused\":0"),
            ("\"open_touches\":4", "\"open_touches\":0"),
            ("\"destroyed\":0", "\"destroyed\":1"),
            ("\"pins\":0", "\"pins\":1"),
            ("\"busy_refused\":2", "\"busy_refused\":0"),
        ];
        each_fails(OPEN, Guest::NonProtected, &spoilt);
        assert!(judged("done", Bytes::Some).is_err());
    }
}
