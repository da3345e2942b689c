use super::*;
use crate::addr::Pgoff;

const PAGES_PER_ROW: u64 = 512;

fn run(start: u64, nr_pages: u64, look: Look) -> (PgoffRange, PageInfo) {
    let (visibility, residency) = match look {
        Look::Private => (Visibility::Private, Residency::Resident),
        Look::AbsentPrivate => (Visibility::Private, Residency::Absent),
        Look::AbsentShared => (Visibility::Shared, Residency::Absent),
        _ => (Visibility::Shared, Residency::Resident),
    };
    let status = match look {
        Look::Exclusive => PageStatus::ExclusivelyPinned,
        Look::Quarantined => PageStatus::Quarantined,
        _ => PageStatus::Settled,
    };
    let pins = if look == Look::Pinned { 3 } else { 0 };
    let info = PageInfo { visibility, pins, status, residency };
    assert_eq!(Look::of(&info), look);
    (PgoffRange::new(Pgoff::new(start), nr_pages).unwrap(), info)
}

/// A guest of 5 rows and a bit, of which rows 2 and 3 are uniform.
fn sample() -> Vec<(PgoffRange, PageInfo)> {
    vec![
        run(0, 100, Look::Private),
        run(100, 12, Look::Pinned),
        run(112, 600, Look::Shared),
        run(712, 312, Look::Private),
        run(1024, 1024, Look::AbsentPrivate),
        run(2048, 1, Look::Exclusive),
        run(2049, 511, Look::AbsentShared),
        run(2560, 8, Look::Quarantined),
    ]
}

fn picture(pages: &[(PgoffRange, PageInfo)]) -> Picture<'_> {
    Picture { title: "a guest", folio_size: FolioSize::Huge2M, pages }
}

/// A tag of an XML document, or the text before one.
#[derive(Debug, PartialEq)]
enum Token<'a> {
    Open(&'a str, Vec<(&'a str, &'a str)>),
    Close(&'a str),
    Text(&'a str),
}

/// Reads a document strictly, though not all of XML: no comments, no processing instructions.
/// Fails on anything that is not well-formed.
fn parse(xml: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut open: Vec<&str> = Vec::new();
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        let (text, tag) = rest.split_at(start);
        check_text(text);
        tokens.push(Token::Text(text));
        let end = tag.find('>').expect("every tag ends");
        let inside = &tag[1..end];
        rest = &tag[end + 1..];
        if let Some(name) = inside.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "tags close in the order they were opened");
            tokens.push(Token::Close(name));
            continue;
        }
        let (inside, empty) = match inside.strip_suffix('/') {
            Some(inside) => (inside, true),
            None => (inside, false),
        };
        let (name, attributes) = inside.split_once(' ').unwrap_or((inside, ""));
        tokens.push(Token::Open(name, parse_attributes(attributes)));
        if empty {
            tokens.push(Token::Close(name));
        } else {
            open.push(name);
        }
        assert!(!open.is_empty() || rest.trim().is_empty(), "one root element, nothing behind it");
    }
    assert!(open.is_empty() && rest.trim().is_empty());
    tokens
}

fn parse_attributes(mut rest: &str) -> Vec<(&str, &str)> {
    let mut attributes = Vec::new();
    while !rest.trim().is_empty() {
        let (name, behind) = rest.trim_start().split_once("=\"").expect("name=\"value\"");
        let (value, behind) = behind.split_once('"').expect("a value ends");
        check_text(value);
        assert!(!name.contains(char::is_whitespace));
        attributes.push((name, value));
        rest = behind;
    }
    attributes
}

fn check_text(text: &str) {
    for after in text.split('&').skip(1) {
        let entity = after.split_once(';').expect("an entity ends").0;
        assert!(["amp", "lt", "gt", "quot", "apos"].contains(&entity), "{entity}");
    }
    assert!(text.chars().all(|c| !c.is_control() || c == '\n'));
}

/// The page counts of the cells, by class.
fn pages_of_class(svg: &str, class: &str) -> u64 {
    let wanted = format!("cell {class}");
    let cells = parse(svg).into_iter().filter_map(|token| match token {
        Token::Open("rect", attributes) => Some(attributes),
        _ => None,
    });
    cells
        .filter(|cell| cell.contains(&("class", &wanted)))
        .map(|cell| {
            let pages = cell.iter().find(|(name, _)| *name == "data-pages").unwrap().1;
            pages.parse::<u64>().unwrap()
        })
        .sum()
}

#[test]
fn the_cells_of_the_svg_are_the_pages_of_the_snapshot() {
    let pages = sample();
    let svg = picture(&pages).to_svg();
    for (look, class) in [
        (Look::Private, "private"),
        (Look::Shared, "shared"),
        (Look::Pinned, "pinned"),
        (Look::Exclusive, "exclusive"),
        (Look::AbsentPrivate, "absent-private"),
        (Look::AbsentShared, "absent-shared"),
        (Look::Quarantined, "quarantined"),
    ] {
        let expected: u64 = pages
            .iter()
            .filter(|(_, info)| Look::of(info) == look)
            .map(|(range, _)| range.nr_pages())
            .sum();
        assert_eq!(pages_of_class(&svg, class), expected, "{class}");
    }
}

#[test]
fn cells_say_where_they_are_and_what() {
    let svg = picture(&sample()).to_svg();
    assert!(svg.contains("<title>0x64000..0x70000: 48 KiB, shared, pinned, pins: 3</title>"));
    assert!(svg.contains("<title>0x400000..0x600000: 2 MiB, private, absent</title>"));
}

#[test]
fn folios_are_framed_and_in_large_objects_rows_that_are_alike_are_drawn_once() {
    let svg = picture(&sample()).to_svg();
    let frames = |class| svg.matches(&format!("class=\"{class}\"")).count();
    // Rows 0 to 4 are huge folios; what is left behind them is made of small ones.
    assert_eq!((frames("folio"), frames("small")), (5, 1));
    let large = [run(0, 5, Look::Private), run(5, 200 * PAGES_PER_ROW, Look::Shared)];
    let svg = picture(&large).to_svg();
    assert_eq!(svg.matches("class=\"folio\"").count(), 2);
    assert_eq!(svg.matches("x 199 rows").count(), 1);
    let small = Picture { folio_size: FolioSize::Base, ..picture(&sample()) }.to_svg();
    assert!(!small.contains("class=\"folio\""));
}

#[test]
fn a_title_may_hold_anything() {
    let title = "a<b>&\"c'\u{0}\u{1b}[31m]]>\u{ffff}\nd";
    let pages = sample();
    let svg = Picture { title, ..picture(&pages) }.to_svg();
    parse(&svg);
    assert!(svg.contains("a&lt;b&gt;&amp;&quot;c&apos;"));
}

#[test]
fn nothing_at_all_is_a_picture_as_well() {
    parse(&picture(&[]).to_svg());
    assert!(picture(&[]).to_text().contains("each row 2 MiB"));
}

#[test]
fn the_largest_object_is_drawn_without_drawing_each_folio() {
    let pages = [run(0, crate::geometry::MAX_PAGES, Look::AbsentPrivate)];
    let svg = picture(&pages).to_svg();
    assert_eq!(pages_of_class(&svg, "absent-private"), crate::geometry::MAX_PAGES);
    assert!(svg.len() < 10_000);
}

#[test]
fn the_text_has_a_character_for_eight_pages() {
    let text = picture(&sample()).to_text();
    let rows: Vec<&str> = text.lines().filter(|line| line.contains('|')).collect();
    assert_eq!(rows.len(), 6);
    let cells = |row: &str| row.split('|').nth(1).unwrap().to_owned();
    // Private up to page 96, then a character with both, then pins, then shared pages.
    assert_eq!(cells(rows[0]), format!("{}!!{}", "#".repeat(12), "=".repeat(50)));
    assert_eq!(cells(rows[1]), format!("{}{}", "=".repeat(25), "#".repeat(39)));
    assert_eq!(cells(rows[2]), ".".repeat(64));
    assert_eq!(cells(rows[3]), cells(rows[2]));
    assert_eq!(cells(rows[4]), format!("X{}", "-".repeat(63)));
    assert_eq!(cells(rows[5]).trim_end(), "?");
    assert!(text.contains("!  shared, pinned: 48 KiB"));
}

#[test]
fn sides_that_meet_under_one_character_show() {
    let pages = [run(0, 4, Look::Private), run(4, PAGES_PER_ROW - 4, Look::Shared)];
    let text = picture(&pages).to_text();
    assert!(text.contains(&format!("|%{}|", "=".repeat(63))));
}
