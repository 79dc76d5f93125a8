//! What the devices of a machine have done, for Prometheus: counters, gauges and histograms in its text format, served over HTTP.
//!
//! Prometheus scrapes a TCP address itself. For node_exporter's textfile collector, or by hand, a Unix socket does:
//! `curl --unix-socket PATH http://linux/metrics`.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::prometheus_text::{CONTENT_TYPE, encode};
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use vmm_devices::virtio::balloon::{BalloonCounters, BalloonHandle, PAGE, Statistic};
use vmm_devices::virtio::metrics::{
    DeviceMetrics, LATENCY_BUCKETS, MetricsSnapshot, Totals, latency_bound_ns,
};
use vmm_devices::virtio::net::{NetCounters, NetHandle};
use vmm_devices::virtio::vsock::{VsockCounters, VsockHandle};

use crate::socket;

/// Bytes that a request may have before its empty line.
const LONGEST_REQUEST: u64 = 8 << 10;

/// Who sends or reads nothing for so long is gone: others wait.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

const AFTER_FAILURE: Duration = Duration::from_millis(100);

const NANOSECONDS: f64 = 1e9;

/// Where figures are served.
#[derive(Debug)]
pub struct Exporter(Listener);

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Exporter {
    /// Listens at `address`: `unix:PATH`, `HOST:PORT`, or `:PORT` on the loopback interface.
    ///
    /// # Errors
    /// If it is none of these, or the host refuses it.
    pub fn listen(address: &str) -> Result<Self> {
        if let Some(path) = address.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self(Listener::Unix(socket::listen(Path::new(path))?)));
        }
        let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        ensure!(port.is_some(), "{address:?} is not HOST:PORT, :PORT or unix:PATH");
        let host = if address.starts_with(':') { "127.0.0.1" } else { "" };
        let bound = TcpListener::bind(format!("{host}{address}"));
        Ok(Self(Listener::Tcp(bound.with_context(|| format!("listening at {address}"))?)))
    }

    /// Starts the thread that answers with what `sources` have, one request after another.
    ///
    /// # Errors
    /// If the host refuses the thread.
    pub fn serve(self, sources: Sources) -> Result<()> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(sources));
        let serve = move || {
            loop {
                if let Err(error) = self.answer(&registry) {
                    tracing::debug!(%error, "a scrape failed");
                    // For want of descriptors, it fails again at once.
                    std::thread::sleep(AFTER_FAILURE);
                }
            }
        };
        std::thread::Builder::new().name("metrics".to_owned()).spawn(serve).context("a thread")?;
        Ok(())
    }

    fn answer(&self, registry: &Registry) -> io::Result<()> {
        let client: OwnedFd = match &self.0 {
            Listener::Tcp(listener) => listener.accept()?.0.into(),
            Listener::Unix(listener) => listener.accept()?.0.into(),
        };
        set_socket_timeout(&client, Timeout::Recv, Some(LONGEST_WAIT))?;
        set_socket_timeout(&client, Timeout::Send, Some(LONGEST_WAIT))?;
        let client = File::from(client);
        respond(&client, &client, registry)
    }
}

/// Reads a request, and answers it.
fn respond(from: impl Read, mut to: impl Write, registry: &Registry) -> io::Result<()> {
    let mut request = Vec::new();
    for byte in io::BufReader::new(from).take(LONGEST_REQUEST).bytes() {
        request.push(byte?);
        if request.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let wanted = request.strip_prefix(b"GET /metrics").and_then(<[u8]>::first);
    let (status, body) = match wanted {
        Some(b' ' | b'?') => {
            let mut body = String::new();
            encode(&mut body, registry).map_err(io::Error::other)?;
            ("200 OK", body)
        }
        _ => ("404 Not Found", "figures are at GET /metrics\n".to_owned()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    to.write_all(head.as_bytes())?;
    to.write_all(body.as_bytes())
}

/// Where the figures come from: devices by their names.
#[derive(Debug, Default)]
pub struct Sources {
    devices: Vec<(String, Arc<DeviceMetrics>)>,
    balloons: Vec<(String, BalloonHandle)>,
    networks: Vec<(String, NetHandle)>,
    vsocks: Vec<(String, VsockHandle)>,
}

impl Sources {
    /// A device of that kind, which is to count there.
    pub fn device(&mut self, kind: &str) -> Arc<DeviceMetrics> {
        let same = self.devices.iter().filter(|(name, _)| name.starts_with(kind)).count();
        let counted = Arc::new(DeviceMetrics::default());
        self.devices.push((format!("{kind}{same}"), Arc::clone(&counted)));
        counted
    }

    /// A network device.
    pub fn network(&mut self, handle: NetHandle) {
        self.networks.push((format!("net{}", self.networks.len()), handle));
    }

    /// A socket device.
    pub fn vsock(&mut self, handle: VsockHandle) {
        self.vsocks.push((format!("vsock{}", self.vsocks.len()), handle));
    }

    /// A balloon.
    pub fn balloon(&mut self, handle: BalloonHandle) {
        self.balloons.push((format!("balloon{}", self.balloons.len()), handle));
    }
}

impl Collector for Sources {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        let taken: Vec<_> = self.devices.iter().map(|(name, device)| (&**name, device.snapshot())).collect();
        families.of_requests(
            "virtio_requests",
            "Requests that ended, errors among them",
            None,
            &taken,
            |totals| totals.requests,
        )?;
        families.of_requests("virtio_request_errors", "Requests that failed", None, &taken, |totals| {
            totals.errors
        })?;
        let bytes = Some(&Unit::Bytes);
        families.of_requests("virtio_transferred", "Data that requests moved", bytes, &taken, |totals| {
            totals.bytes
        })?;
        let throttled = taken.iter().map(|(name, taken)| (*name, taken.throttled));
        families.counters(
            "virtio_throttled_requests",
            "Requests that waited for a rate limit",
            None,
            throttled,
        )?;
        families.latencies(&taken)?;
        if !self.networks.is_empty() {
            families.of_networks(&self.networks)?;
        }
        if !self.vsocks.is_empty() {
            families.of_vsocks(&self.vsocks)?;
        }
        if self.balloons.is_empty() {
            return Ok(());
        }
        families.of_balloons(&self.balloons)
    }
}

/// Writes families of metrics.
struct Families<'a>(DescriptorEncoder<'a>);

/// Name and help of a metric, and what of `T` it shows.
type Family<T, N> = (&'static str, &'static str, fn(&T) -> N);

impl Families<'_> {
    /// By device and activity.
    fn of_requests(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        taken: &[(&str, MetricsSnapshot)],
        figure: impl Fn(&Totals) -> u64,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (device, MetricsSnapshot { read, write, other, .. }) in taken {
            for (activity, totals) in [("read", read), ("write", write), ("other", other)] {
                let labels = [("device", *device), ("activity", activity)];
                ConstCounter::new(figure(totals)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn counters<'s>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        figures: impl Iterator<Item = (&'s str, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (device, figure) in figures {
            ConstCounter::new(figure).encode(family.encode_family(&[("device", device)])?)?;
        }
        Ok(())
    }

    fn latencies(&mut self, taken: &[(&str, MetricsSnapshot)]) -> fmt::Result {
        let help = "From when a device took a request to when it gave it back";
        let name = "virtio_request_duration";
        let mut family = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (device, snapshot) in taken {
            // Ours are below their bounds, Prometheus's at most as large, and ours are whole nanoseconds.
            let bound = |index| match latency_bound_ns(index) {
                u64::MAX => f64::INFINITY,
                bound => (bound - 1) as f64 / NANOSECONDS,
            };
            let buckets: Vec<(f64, u64)> = (0..LATENCY_BUCKETS).map(bound).zip(snapshot.latency).collect();
            let (sum, count) =
                (snapshot.latency_total_ns as f64 / NANOSECONDS, snapshot.latency.iter().sum());
            let labels = [("device", *device)];
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn of_networks(&mut self, networks: &[(String, NetHandle)]) -> fmt::Result {
        type Figure = fn(&NetCounters) -> u64;
        const REASONS: [(&str, Figure); 5] = [
            ("another's", |counted| counted.filtered),
            ("receive", |counted| counted.receive_dropped),
            ("send", |counted| counted.send_dropped),
            ("refused", |counted| counted.refused),
            ("bad buffer", |counted| counted.bad_buffers),
        ];
        let (name, help) = ("virtio_net_dropped_frames", "Frames that were lost, or were not for the guest");
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (device, network) in networks {
            let counted = network.counters();
            for (reason, figure) in REASONS {
                let labels = [("device", &**device), ("reason", reason)];
                ConstCounter::new(figure(&counted)).encode(family.encode_family(&labels)?)?;
            }
        }
        let (name, help) = ("virtio_net_link_up", "Whether the guest's cable is in");
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (device, network) in networks {
            let up = i64::from(network.link().up);
            ConstGauge::new(up).encode(family.encode_family(&[("device", &**device)])?)?;
        }
        Ok(())
    }

    fn of_vsocks(&mut self, vsocks: &[(String, VsockHandle)]) -> fmt::Result {
        let taken: Vec<_> = vsocks.iter().map(|(name, vsock)| (&**name, vsock.counters())).collect();
        let figures: [Family<VsockCounters, u64>; 6] = [
            ("virtio_vsock_opened", "Connections that both sides accepted", |c| c.opened),
            ("virtio_vsock_refused", "Connections that were refused", |c| c.refused),
            ("virtio_vsock_resets", "Connections that the guest reset or refused", |c| c.resets),
            ("virtio_vsock_breaches", "Connections that ended as the guest broke the rules", |c| c.breaches),
            ("virtio_vsock_revoked", "Connections whose grant was revoked", |c| c.revoked),
            ("virtio_vsock_timeouts", "Connections that waited too long", |c| c.timeouts),
        ];
        for (name, help, figure) in figures {
            self.counters(
                name,
                help,
                None,
                taken.iter().map(|(device, counters)| (*device, figure(counters))),
            )?;
        }
        let help = "Connections that there are";
        let mut family =
            self.0.encode_descriptor("virtio_vsock_connections", help, None, MetricType::Gauge)?;
        for (device, counters) in &taken {
            ConstGauge::new(i64::from(counters.connections))
                .encode(family.encode_family(&[("device", *device)])?)?;
        }
        Ok(())
    }

    fn of_balloons(&mut self, balloons: &[(String, BalloonHandle)]) -> fmt::Result {
        let bytes = Some(&Unit::Bytes);
        let counted: Vec<_> = balloons.iter().map(|(name, balloon)| (&**name, balloon.counters())).collect();
        let families: [Family<BalloonCounters, u64>; 3] = [
            ("virtio_balloon_inflated", "Memory that the guest gave back when asked", |counted| {
                counted.inflated
            }),
            ("virtio_balloon_deflated", "Memory that the guest took back of that", |counted| {
                counted.deflated
            }),
            ("virtio_balloon_reported", "Memory that the guest gave back because it was free", |counted| {
                counted.reported
            }),
        ];
        for (name, help, pages) in families {
            let figures =
                counted.iter().map(|(device, counted)| (*device, pages(counted).saturating_mul(PAGE)));
            self.counters(name, help, bytes, figures)?;
        }
        let families: [Family<BalloonHandle, u32>; 2] = [
            ("virtio_balloon_target", "Asked for", BalloonHandle::target),
            ("virtio_balloon_actual", "In the balloon, as the guest says", BalloonHandle::actual),
        ];
        for (name, help, pages) in families {
            let mut family = self.0.encode_descriptor(name, help, bytes, MetricType::Gauge)?;
            for (device, balloon) in balloons {
                let figure = u64::from(pages(balloon)) * PAGE;
                ConstGauge::new(figure).encode(family.encode_family(&[("device", &**device)])?)?;
            }
        }
        self.guest_memory(balloons)
    }

    /// What guests tell of their memory takes its time: these figures were asked for by the scrape before.
    fn guest_memory(&mut self, balloons: &[(String, BalloonHandle)]) -> fmt::Result {
        const KINDS: [(Statistic, &str); 4] = [
            (Statistic::MEMTOT, "total"),
            (Statistic::MEMFREE, "free"),
            (Statistic::AVAIL, "available"),
            (Statistic::CACHES, "caches"),
        ];
        let mut family = self.0.encode_descriptor(
            "virtio_balloon_guest_memory",
            "The guest's memory, as it says",
            Some(&Unit::Bytes),
            MetricType::Gauge,
        )?;
        for (device, balloon) in balloons {
            let told = balloon.statistics().unwrap_or_default();
            for (statistic, kind) in KINDS {
                let Some(bytes) = told.get(statistic) else { continue };
                let labels = [("device", &**device), ("kind", kind)];
                ConstGauge::new(bytes).encode(family.encode_family(&labels)?)?;
            }
            balloon.request_statistics();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_devices::virtio::metrics::{Activity, Ended, Metrics as _};

    use super::*;

    fn answer(sources: Sources, request: &str) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(sources));
        let mut answer = Vec::new();
        respond(request.as_bytes(), &mut answer, &registry).unwrap();
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn every_figure_has_its_line() {
        let mut sources = Sources::default();
        let (disk, _) = (sources.device("block"), sources.device("block"));
        let ended = |activity, bytes, succeeded, latency_ns| Ended { activity, bytes, succeeded, latency_ns };
        disk.ended(ended(Activity::Read, 4096, true, 0));
        disk.ended(ended(Activity::Write, 512, true, 1));
        disk.ended(ended(Activity::Write, 0, false, 1024));
        disk.ended(ended(Activity::Other, 0, true, u64::from(u32::MAX)));
        disk.ended(ended(Activity::Other, 0, true, 1 << 50));
        disk.throttled();
        let answer = answer(sources, "GET /metrics HTTP/1.1\r\nHost: linux\r\n\r\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"), "{head}");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        for line in [
            "# TYPE virtio_requests_total counter",
            r#"virtio_requests_total{device="block0",activity="read"} 1"#,
            r#"virtio_requests_total{device="block0",activity="write"} 2"#,
            r#"virtio_requests_total{device="block0",activity="other"} 2"#,
            r#"virtio_requests_total{device="block1",activity="read"} 0"#,
            r#"virtio_request_errors_total{device="block0",activity="write"} 1"#,
            r#"virtio_transferred_bytes_total{device="block0",activity="read"} 4096"#,
            r#"virtio_transferred_bytes_total{device="block0",activity="write"} 512"#,
            r#"virtio_throttled_requests_total{device="block0"} 1"#,
            "# TYPE virtio_request_duration_seconds histogram",
            // Cumulative: 0, 1, 1024 and 2^32 - 1 ns, and one beyond all bounds.
            r#"virtio_request_duration_seconds_bucket{device="block0",le="0"} 1"#,
            r#"virtio_request_duration_seconds_bucket{device="block0",le="1e-09"} 2"#,
            r#"virtio_request_duration_seconds_bucket{device="block0",le="1.023e-06"} 2"#,
            r#"virtio_request_duration_seconds_bucket{device="block0",le="2.047e-06"} 3"#,
            r#"virtio_request_duration_seconds_bucket{device="block0",le="2.147483647"} 3"#,
            r#"virtio_request_duration_seconds_bucket{device="block0",le="4.294967295"} 4"#,
            r#"virtio_request_duration_seconds_bucket{device="block0",le="+Inf"} 5"#,
            r#"virtio_request_duration_seconds_count{device="block0"} 5"#,
        ] {
            assert!(body.lines().any(|found| found == line), "no {line}:\n{body}");
        }
        let sum = body.lines().find(|line| line.starts_with("virtio_request_duration_seconds_sum")).unwrap();
        let sum: f64 = sum.rsplit_once(' ').unwrap().1.parse().unwrap();
        assert!((sum - ((1_u64 << 50) as f64 + 4_294_968_320.0) / 1e9).abs() < 1e-6, "{sum}");
        assert!(!body.contains("balloon"), "{body}");
    }

    #[test]
    fn a_request_for_something_else_is_told_where_figures_are() {
        let long = format!("GET /{}", "x".repeat(1 << 16));
        for request in
            ["GET / HTTP/1.1\r\n\r\n", "POST /metrics HTTP/1.1\r\n\r\n", "GET /metricsx", "", &long]
        {
            let answer = answer(Sources::default(), request);
            assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{request}: {answer}");
            assert!(answer.ends_with("figures are at GET /metrics\n"), "{request}: {answer}");
        }
    }

    #[test]
    fn an_address_that_is_none_is_named() {
        for address in ["unix:", "9100", "host:port", ""] {
            let error = Exporter::listen(address).unwrap_err().to_string();
            assert_eq!(error, format!("{address:?} is not HOST:PORT, :PORT or unix:PATH"));
        }
    }
}
