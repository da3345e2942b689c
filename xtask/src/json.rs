//! Just enough JSON to read one object: the example's last line.

use std::collections::BTreeMap;

pub(crate) type Object = BTreeMap<String, Value>;

/// How deep objects lie in one another, at most.
const MOST_DEEP: usize = 8;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Bool(bool),
    Number(f64),
    Text(String),
    Null,
    Object(Object),
}

/// Reads `{"key": value, ...}` where every value is a bool, a number, a string, null or such an object.
pub(crate) fn parse_object(line: &str) -> Result<Object, String> {
    match object(line.trim(), MOST_DEEP)? {
        (object, "") => Ok(object),
        (_, rest) => Err(format!("trailing {rest:?}")),
    }
}

fn object(rest: &str, deep: usize) -> Result<(Object, &str), String> {
    let mut rest = take(rest, '{')?;
    let mut object = Object::new();
    if let Some(after) = rest.trim_start().strip_prefix('}') {
        return Ok((object, after));
    }
    loop {
        let (key, after) = text(rest.trim_start())?;
        let (value, after) = value(take(after, ':')?.trim_start(), deep)?;
        if object.insert(key.clone(), value).is_some() {
            return Err(format!("the key {key:?} comes twice"));
        }
        rest = after.trim_start();
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return Ok((object, take(rest, '}')?)),
        }
    }
}

fn take(rest: &str, wanted: char) -> Result<&str, String> {
    rest.trim_start().strip_prefix(wanted).ok_or_else(|| format!("expected {wanted:?} at {rest:?}"))
}

fn value(rest: &str, deep: usize) -> Result<(Value, &str), String> {
    if rest.starts_with('{') {
        let deep = deep.checked_sub(1).ok_or("objects lie too deep in one another")?;
        let (object, after) = object(rest, deep)?;
        return Ok((Value::Object(object), after));
    }
    if rest.starts_with('"') {
        let (text, after) = text(rest)?;
        return Ok((Value::Text(text), after));
    }
    let end = rest.find([',', '}']).ok_or_else(|| format!("unfinished value {rest:?}"))?;
    let (word, after) = rest.split_at(end);
    let value = match word.trim() {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        number => Value::Number(number.parse().map_err(|_| format!("not a value: {number:?}"))?),
    };
    Ok((value, after))
}

fn text(rest: &str) -> Result<(String, &str), String> {
    let body = rest.strip_prefix('"').ok_or_else(|| format!("expected a string at {rest:?}"))?;
    let mut text = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((text, &body[at + 1..])),
            '\\' => match chars.next() {
                Some((_, c @ ('"' | '\\' | '/'))) => text.push(c),
                Some((_, 'n')) => text.push('\n'),
                Some((_, 't')) => text.push('\t'),
                escape => return Err(format!("unsupported escape {escape:?}")),
            },
            c => text.push(c),
        }
    }
    Err(format!("unfinished string {rest:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_read() {
        let object = parse_object(
            r#" {"sha256_match":true,"bytes": 12 , "audit":"cle\"an","rate":1.5,"map":null} "#,
        )
        .expect("valid JSON");
        assert_eq!(object["sha256_match"], Value::Bool(true));
        assert_eq!(object["bytes"], Value::Number(12.0));
        assert_eq!(object["audit"], Value::Text("cle\"an".into()));
        assert_eq!(object["rate"], Value::Number(1.5));
        assert_eq!(object["map"], Value::Null);
        assert!(parse_object("{}").expect("valid JSON").is_empty());
    }

    #[test]
    fn objects_lie_in_one_another() {
        let object = parse_object(r#"{"a": {"b":{"c": 1 } , "d":{}}, "e":2}"#).expect("valid JSON");
        let Value::Object(a) = &object["a"] else { panic!("{object:?}") };
        let Value::Object(b) = &a["b"] else { panic!("{a:?}") };
        assert_eq!(b["c"], Value::Number(1.0));
        assert_eq!(a["d"], Value::Object(Object::new()));
        assert_eq!(object["e"], Value::Number(2.0));
        let nested = |deep| format!("{}1{}", "{\"a\":".repeat(deep), "}".repeat(deep));
        assert!(parse_object(&nested(MOST_DEEP + 1)).is_ok());
        assert!(parse_object(&nested(MOST_DEEP + 2)).is_err());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in [
            "",
            "12",
            "{",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":1} x",
            "{\"a\":{}",
            "{\"a\":{\"b\":1}}}",
            "{\"a\":yes}",
            "{\"a\":1,\"a\":2}",
        ] {
            assert!(parse_object(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
