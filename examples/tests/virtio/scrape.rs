//! What Prometheus would see.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// Samples by name and labels.
#[derive(Debug)]
pub(crate) struct Figures(BTreeMap<String, f64>);

impl Figures {
    pub(crate) fn scrape(mut client: UnixStream) -> Self {
        client.write_all(b"GET /metrics HTTP/1.1\r\nHost: linux\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let samples = body.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        });
        let figures = Self(samples.collect());
        figures.check_histograms(body);
        figures
    }

    /// The sample with that name and those labels.
    pub(crate) fn get(&self, name: &str) -> f64 {
        *self.0.get(name).unwrap_or_else(|| panic!("no {name} in {self:#?}"))
    }

    /// Of a device's requests.
    pub(crate) fn of(&self, name: &str, device: &str, activity: &str) -> f64 {
        self.get(&format!("virtio_{name}_total{{device={device:?},activity={activity:?}}}"))
    }

    /// Buckets go up to infinity, where all requests are.
    fn check_histograms(&self, body: &str) {
        const NAME: &str = "virtio_request_duration_seconds";
        let (mut before, mut histograms) = ((f64::NEG_INFINITY, 0.0), 0);
        for line in body.lines() {
            let Some(bucket) = line.strip_prefix(&format!("{NAME}_bucket{{")) else { continue };
            let (labels, rest) = bucket.split_once(",le=\"").unwrap();
            let (bound, value) = rest.split_once("\"} ").unwrap();
            let (bound, count): (f64, f64) = (bound.parse().unwrap(), value.parse().unwrap());
            assert!(bound > before.0 && count >= before.1, "{line}");
            before = (bound, count);
            if bound.is_infinite() {
                assert_eq!(count, self.get(&format!("{NAME}_count{{{labels}}}")), "{line}");
                assert_eq!(count > 0.0, self.get(&format!("{NAME}_sum{{{labels}}}")) > 0.0, "{line}");
                before = (f64::NEG_INFINITY, 0.0);
                histograms += 1;
            }
        }
        assert!(histograms > 0 && before.1 == 0.0, "{body}");
    }
}
