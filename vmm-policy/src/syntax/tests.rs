//! What is read, what is refused and how, and what comes back as text.

use super::*;

pub(crate) const TENANTS: &str = include_str!("../../policies/two-tenants.policy");

fn read(text: &str) -> Result<(Document, Vec<Statement>), PolicyError> {
    let (document, all, sources, report) = parse_all("p", text.to_owned(), &NoIncludes);
    report.finish(&sources)?;
    Ok((document, all))
}

fn refusal(text: &str) -> String {
    read(text).map(|(document, _)| document.to_string()).unwrap_err().to_string()
}

#[test]
fn the_example_is_as_the_formatter_writes_it() {
    assert_eq!(read(TENANTS).unwrap().0.to_string(), TENANTS);
}

#[test]
fn each_sentence_comes_back_as_it_was() {
    for sentence in [
        "policy \"a \\\"title\\\"\"",
        "labels web, \"two words\", \"vm\"",
        "family tenant: red, blue",
        "secrecy public < internal < secret",
        "categories pay, health",
        "wall banks: red, blue",
        "vm a",
        "vm a { uuid 6f9619ff-8b86-d011-b42d-00c04fc964ff }",
        "vm a {\n    labels red, web\n    secrecy internal with pay, health\n    integrity low\n    guard\n}",
        "network lan { filtered }",
        "allow web to connect vsock 5432 of db in same tenant",
        "allow web and not red or (a or b) and c to connect, accept vsock 1, 80..90 of any vm",
        "allow web to map-ro, create region of any object in same tenant",
        "deny any to anything",
        "deny any to anything vsock 22 of any in other tenant unless attested and peer running",
        "deny any to use mmio 0xfee00000..0xfee00fff",
        "allow web to map-ro region frames, web-*, \"odd name*\"",
        "allow any to send icmp 8 of any when not (running or paused) and not flag maintenance",
        "allow any host to administer pause, resume of web when between 22:00 and 06:30 on mon..fri, sun",
        "allow any to use balloon when measured abcdef01",
        "throttle web to connect tcp of db at 10 MiB per second",
        "redirect web to send udp 53 of any onto dns 5353",
        "ask any host to administer destroy of web by any host and not web within 10 minutes",
        "never red to anything of blue",
        "never red to reach blue or green",
        "limit any to use hypercall at 1000 per minute burst 50",
        "limit any to map-rw region of any at 4096 pages",
        "limit any to connect vsock of any at 8 open",
        "limit any to connect tcp of any at 1536 bytes per 5 minutes burst 1 KiB",
        "escalate any vm: throttle after 10, reset after 100, pause after 1000, kill after 10000 per minute",
    ] {
        let (document, _) = read(sentence).unwrap_or_else(|error| panic!("{sentence}: {error}"));
        assert_eq!(document.to_string().trim_end(), sentence);
        assert_eq!(read(&document.to_string()).unwrap().0, document);
    }
}

#[test]
fn comments_stay_where_they_are() {
    let text = "# first\n#\n# more\n\n# about a\nlabels a  # behind\n\nlabels b\nlabels c\n\n# last\n";
    assert_eq!(read(text).unwrap().0.to_string(), text);
    let inside = "vm a { # why\n  labels a # because\n guard }\n";
    assert_eq!(read(inside).unwrap().0.to_string(), "# why\n# because\nvm a {\n    labels a\n    guard\n}\n");
}

#[test]
fn a_refusal_says_where_what_and_what_would_be_right() {
    for (text, wanted) in [
        ("alow web to connect vsock", "p:1:1: expected a statement, found \"alow\"; did you mean \"allow\"?"),
        (
            "labels a\n\n  allow a to conect vsock",
            "p:3:14: expected what is done, found \"conect\"; did you mean \"connect\"?",
        ),
        (
            "allow a to connect vsok 1",
            "p:1:20: expected a kind of object, found \"vsok\"; did you mean \"vsock\"?",
        ),
        (
            "allow a to notify disk",
            "p:1:12: nobody can notify disk; disk knows attach, attach-ro, export or create",
        ),
        (
            "allow a to connect tcp 70000",
            "p:1:24: a tcp number is a number up to 65535, and \"70000\" is none",
        ),
        ("allow a to connect tcp 9..1", "p:1:24: the range ends before it begins; 1..9"),
        ("allow a to use balloon x", "p:1:24: balloon has no numbers or names"),
        (
            "allow a to connect vsock in same tenant",
            "p:1:29: nobody is named whose family could be the same; add \"of any\" before \"in\"",
        ),
        ("allow a connect vsock", "p:1:9: expected \"to\", found \"connect\"; it may be to"),
        (
            "allow vm to connect vsock",
            "p:1:7: expected a label, a name or \"any\", found \"vm\"; a name that is a word of the language stands in quotes: \"vm\"",
        ),
        (
            "allow a to connect vsock 1 when runing",
            "p:1:33: expected a condition, found \"runing\"; did you mean \"running\"?",
        ),
        (
            "allow a to connect vsock 1 when between 25:00 and 1:00",
            "p:1:41: an hour is a number up to 23, and \"25\" is none",
        ),
        (
            "never a to connect vsock when running",
            "p:1:26: \"never\" has no condition: it is always so; \"deny\" may have one",
        ),
        (
            "limit a to connect vsock at 0 open",
            "p:1:29: to limit to nothing is to deny; write a \"deny\" rule",
        ),
        (
            "limit a to connect vsock at 5 apples",
            "p:1:31: expected a unit, found \"apples\"; it may be bytes, KiB, MiB, GiB, pages, open or per",
        ),
        (
            "escalate a: kill after 1, pause after 2 per second",
            "p:1:27: each step is harsher than the one before, and comes later; throttle, reset, pause, kill is the order",
        ),
        ("vm a { labels b labels c }", "p:1:17: \"labels\" is given twice"),
        (
            "vm a { colour red }",
            "p:1:8: expected what it has, found \"colour\"; it may be uuid, labels, secrecy, integrity or guard",
        ),
        (
            "allow a to use msr 1 when measured xyz",
            "p:1:36: a digest is an even number of hexadecimal digits",
        ),
        ("include \"x\"", "p:1:9: \"x\" cannot be included: this policy was not read from a file"),
        ("allow a to", "p:1:11: expected what is done, found the end"),
    ] {
        let found = refusal(text);
        assert!(found.starts_with(wanted), "{text}\n  {found}\n  {wanted}");
    }
}

#[test]
fn one_mistake_hides_no_other() {
    let found =
        refusal("labels a b\nalow a\nallow a to conect vsock\nallow a to connect vsock 1\nnever a to\n");
    let places: Vec<_> = found.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(places, ["p:1:10:", "p:2:1:", "p:3:12:", "p:5:11:"]);
}

#[test]
fn includes_are_read_once_and_in_their_place() {
    let files = [("a", "labels one\ninclude \"b\"\nlabels three"), ("b", "labels two\n")];
    let loader = MemoryLoader(files.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
    let text = "include \"a\"\ninclude \"b\"\nlabels four";
    let (document, all, sources, report) = parse_all("top", text.into(), &loader);
    report.finish(&sources).unwrap();
    let items: Vec<_> = all.iter().map(|statement| statement.item.to_string()).collect();
    assert_eq!(items, ["labels one", "labels two", "labels three", "labels four"]);
    assert_eq!(document.to_string(), "include \"a\"\ninclude \"b\"\nlabels four\n");
    assert_eq!(sources.name(all[1].span), "b");
}

#[test]
fn what_includes_itself_is_refused() {
    let files = [("a", "include \"b\""), ("b", "labels x\ninclude \"a\"")];
    let loader = MemoryLoader(files.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
    let (_, _, sources, report) = parse_all("a", "include \"b\"".into(), &loader);
    let error = report.finish(&sources).unwrap_err().to_string();
    assert_eq!(error, "b:2:9: \"a\" would include itself; a includes b is where it begins");
}

#[test]
fn a_folder_of_files_is_not_left() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("inside");
    std::fs::create_dir_all(inside.join("more")).unwrap();
    std::fs::write(folder.path().join("secret"), "labels secret").unwrap();
    std::fs::write(inside.join("more/good"), "labels good").unwrap();
    std::os::unix::fs::symlink(folder.path().join("secret"), inside.join("link")).unwrap();
    let loader = FileLoader::new(&inside).unwrap();
    assert_eq!(loader.load("top", "more/good").unwrap(), ("more/good".to_owned(), "labels good".to_owned()));
    assert_eq!(loader.load("more/good", "good").unwrap().0, "more/good");
    for path in ["../secret", "/etc/hostname", "link", "more/../../secret", "absent", "more"] {
        loader.load("top", path).map(|(name, _)| name).expect_err(path);
    }
}

#[test]
fn depth_and_length_have_bounds() {
    let deep = format!("allow {}a{} to connect vsock", "(".repeat(100_000), ")".repeat(100_000));
    assert!(refusal(&deep).contains("more than 32 parentheses"), "{}", refusal(&deep));
    let nots = format!("allow {} a to connect vsock", "not ".repeat(100_000));
    assert!(refusal(&nots).contains("more than 32 parentheses"));
    let long = format!("labels {}a", "a, ".repeat(10_000));
    assert!(refusal(&long).contains("a list has at most 4096 things"));
    let name = format!("labels {}", "a".repeat(300));
    assert!(refusal(&name).contains("a name has 1 to 255 bytes"));
    let noise = "\u{1f980} ".repeat(1_000_000);
    assert_eq!(refusal(&noise).lines().count(), crate::limits::PROBLEMS);
}

#[test]
fn a_request_is_a_sentence_too() {
    let request = sentence("web-red to connect vsock 5432 of db-red when running").unwrap();
    assert_eq!((request.action, request.kind), (crate::Action::Connect, crate::Kind::Vsock));
    assert!(request.when.is_some());
    for wrong in [
        "",
        "web",
        "web to anything",
        "web to connect vsock",
        "web to connect vsock 1..2",
        "web to connect vsock 1 of a b",
    ] {
        assert!(sentence(wrong).is_err(), "{wrong}");
    }
}

#[cfg(feature = "serde")]
#[test]
fn a_document_comes_back_from_json() {
    let document = read(TENANTS).unwrap().0;
    let json = serde_json::to_string(&document).unwrap();
    let again: Document = serde_json::from_str(&json).unwrap();
    assert_eq!(again, document);
    let made = r#"{"statements":[{"labels":["web"]},{"rule":{"effect":"allow","asker":{"label":"web"},"access":{"actions":["use"],"kind":"balloon"}}}]}"#;
    let made: Document = serde_json::from_str(made).unwrap();
    assert_eq!(made.to_string(), "labels web\nallow web to use balloon\n");
    assert!(crate::Policy::from_document(&made).is_ok());
}

#[test]
fn what_begins_a_line_begins_a_statement() {
    let text = "allow a to connect vsock of any\nvm a\nallow a to anything of any\nhost b\nallow a to anything\nregion c\n";
    let kinds: Vec<String> =
        read(text).unwrap().1.iter().map(|statement| statement.item.to_string()).collect();
    assert_eq!(kinds.join("\n") + "\n", text);
}
