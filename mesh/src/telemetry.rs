//! Logs, traces and metrics: one set of options, one [`init`], one [`Guard`].
//!
//! - **Logs** go to stderr, as text or JSON lines.
//! - **Traces** leave over OTLP/gRPC only when an endpoint is given. Without one no OpenTelemetry layer exists: no trace
//!   ids are made up, nothing is injected, and a span costs one branch. [`propagation`] works all the same.
//! - **Metrics** are collected always and read at the admin port.
//!
//! Logging and metrics are process-global, and rightly so: the `tracing` and `metrics` macros know one destination
//! per process, and what is measured (CPU, memory, the runtime) is shared too. Two meshes in one process add up in the
//! same counters; whoever must tell them apart runs two processes.

use std::{io::IsTerminal, sync::OnceLock, time::Duration};

use anyhow::{Context as _, bail};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider},
};
use tracing::{Level, Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, filter_fn},
    fmt::MakeWriter,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

pub mod propagation;

pub use propagation::{Carrier, current_traceparent, inject_current, link, parent_of, set_parent, trace_id};

/// How long the last spans may take to leave. A collector that is away must not hold up a stop.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// Spans waiting for export, at most. A rush makes thousands a second; what does not fit is dropped, never waited for.
const MAX_SPANS_QUEUED: usize = 65_536;

/// A batch links to each of its producers, and batches are up to several hundred: the default of 128 would cut it.
const MAX_LINKS: u32 = 1024;

/// From a call in process to a payment that drags on; finer where buyers begin to notice, and where targets are.
const SECONDS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// Batches double under load.
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// How often samples are moved out of their buffers, which grow until then if nobody reads the metrics.
const UPKEEP: Duration = Duration::from_secs(1);

/// What every program of ours can be told about logs and traces.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Telemetry")]
pub struct TelemetryArgs {
    /// How log lines are written
    #[arg(long, env = "SECKILL_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub log_format: LogFormat,

    /// What is logged: a level, or directives such as `info,coordinator=debug`
    #[arg(long, env = "SECKILL_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,

    /// Where traces go, over OTLP/gRPC, e.g. http://localhost:4317; without it none are made
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// The share of traces that are exported, from 0 to 1; a caller's own decision is kept
    #[arg(long, env = "SECKILL_TRACE_SAMPLE", default_value_t = 1.0, value_parser = share, value_name = "RATIO")]
    pub trace_sample: f64,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For eyes.
    Text,
    /// One JSON object a line, for machines.
    Json,
}

impl Default for TelemetryArgs {
    fn default() -> Self {
        Self { log_format: LogFormat::Text, log: "info".to_owned(), otlp_endpoint: None, trace_sample: 1.0 }
    }
}

/// Sends what is left when it goes. Keep it until the very end.
#[derive(Debug)]
#[must_use = "dropping it ends the export of traces"]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Guard {
    /// Sends the last spans, within a bound, without blocking the runtime that carries them.
    pub async fn shutdown(mut self) {
        if let Some(provider) = self.provider.take() {
            // A panic in there would lose spans and nothing else.
            let _ = tokio::task::spawn_blocking(move || flush(&provider)).await;
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            flush(&provider);
        }
    }
}

fn flush(provider: &SdkTracerProvider) {
    if let Err(error) = provider.shutdown_with_timeout(FLUSH_LIMIT) {
        tracing::warn!(%error, "the last spans could not be sent");
    }
}

/// Sets up logs, traces and metrics for this process. Fails when called twice, on a filter that cannot be read, and on
/// an endpoint that cannot be used. An endpoint that is merely away is no failure: spans are dropped and a warning
/// logged.
pub fn init(args: &TelemetryArgs, service_name: &str) -> anyhow::Result<Guard> {
    // First, so that no metric is registered before there is somewhere to register it.
    prometheus();
    let provider = match args.otlp_endpoint.as_deref() {
        // Empty counts as unset, as OpenTelemetry has it.
        None | Some("") => None,
        Some(endpoint) => Some(exporting(endpoint, args.trace_sample, service_name)?),
    };
    subscriber(args, std::io::stderr, std::io::stderr().is_terminal(), provider.as_ref())?
        .try_init()
        .context("telemetry is already set up in this process")?;
    Ok(Guard { provider })
}

/// The process's metrics. The first call installs the recorder; every later one answers the same handle, so that two
/// meshes in one process share it (see the module).
pub fn prometheus() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)
            .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), SIZES))
            .expect("the buckets are not empty")
            .build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("metrics go elsewhere: another recorder is installed in this process");
        }
        // As global as the recorder, hence on a thread of its own and not a task of somebody's runtime. It holds
        // nothing that must be finished, and dies with the process.
        let upkeep = handle.clone();
        let spawned = std::thread::Builder::new().name("metrics-upkeep".to_owned()).spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "metrics are only tidied when they are read");
        }
        handle
    })
}

/// The provider that sends spans to `endpoint`.
fn exporting(endpoint: &str, sample: f64, service_name: &str) -> anyhow::Result<SdkTracerProvider> {
    if !endpoint.starts_with("http://") {
        bail!("the OTLP endpoint must be http://host:port (gRPC, cleartext): {endpoint:?}");
    }
    if tokio::runtime::Handle::try_current().is_err() {
        bail!("traces are exported by the runtime, and there is none yet");
    }
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(FLUSH_LIMIT)
        .build()
        .with_context(|| format!("cannot export traces to {endpoint}"))?;
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(MAX_SPANS_QUEUED)
        .with_max_export_batch_size(2048)
        .with_scheduled_delay(Duration::from_secs(1))
        .build();
    let mut resource = Resource::builder();
    // The environment's own word for it is already in the builder, and wins.
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(service_name.to_owned());
    }
    let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    Ok(SdkTracerProvider::builder()
        .with_resource(resource.with_attribute(version).build())
        .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
        .with_sampler(sampler(sample))
        .with_max_links_per_span(MAX_LINKS)
        .build())
}

/// The caller's decision where there is one, else this share, by trace id, so that every process decides alike.
fn sampler(share: f64) -> Sampler {
    Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(share)))
}

/// One filter per layer, since they want different things: logs what `--log` says, traces every span of info or above.
fn subscriber<W>(
    args: &TelemetryArgs,
    writer: W,
    ansi: bool,
    provider: Option<&SdkTracerProvider>,
) -> anyhow::Result<impl Subscriber + Send + Sync + use<W>>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("cannot read the log filter {:?}", args.log))?;
    let most = filter.max_level_hint().unwrap_or(LevelFilter::TRACE);
    // Formatting a span for lines that are never written is most of what a span costs. At info nothing is logged on a
    // buyer's path, so spans are kept for logs only from debug on, or when traces pay for them anyway.
    let spans = most >= LevelFilter::DEBUG || provider.is_some();
    let wanted = filter_fn(move |metadata| spans || metadata.is_event()).with_max_level_hint(most);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(ansi);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match args.log_format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    let mut layers = vec![lines.with_filter(filter.and(wanted)).boxed()];
    if let Some(provider) = provider {
        let traces = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("seckill"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_filter(filter_fn(traced).with_max_level_hint(LevelFilter::INFO));
        layers.push(traces.boxed());
    }
    Ok(Registry::default().with(layers))
}

/// Dependencies' spans are all below info. Of events only those worth an operator's eye go along, and never the
/// exporter's own, which would feed itself.
fn traced(metadata: &Metadata<'_>) -> bool {
    if metadata.is_span() {
        *metadata.level() <= Level::INFO
    } else {
        *metadata.level() <= Level::WARN && !metadata.target().starts_with("opentelemetry")
    }
}

/// A number from 0 to 1.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("must be a number from 0 to 1".to_owned()),
    }
}

/// A provider that keeps its spans, for tests.
#[cfg(test)]
pub(crate) mod kept {
    use std::sync::{Arc, Mutex};

    use opentelemetry_sdk::{
        error::OTelSdkResult,
        trace::{SpanData, SpanExporter},
    };

    use super::*;

    /// Finished spans.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Spans(Arc<Mutex<Vec<SpanData>>>);

    impl Spans {
        /// All finished spans with this name.
        pub(crate) fn named(&self, name: &str) -> Vec<SpanData> {
            self.0.lock().unwrap().iter().filter(|s| s.name == name).cloned().collect()
        }
    }

    impl SpanExporter for Spans {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    /// Runs on this thread until the guard goes.
    pub(crate) fn tracing_into(spans: &Spans) -> tracing::subscriber::DefaultGuard {
        let provider = SdkTracerProvider::builder().with_simple_exporter(spans.clone()).build();
        let subscriber = subscriber(&TelemetryArgs::default(), std::io::sink, false, Some(&provider)).unwrap();
        tracing::subscriber::set_default(subscriber)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        telemetry: TelemetryArgs,
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn lines(args: &[&str], work: impl FnOnce()) -> String {
        let args = Program::parse_from([&["program"], args].concat()).telemetry;
        let written = Written::default();
        let writer = written.clone();
        let subscriber = subscriber(&args, move || writer.clone(), false, None).unwrap();
        tracing::subscriber::with_default(subscriber, work);
        String::from_utf8(written.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn json_lines_are_objects_without_made_up_trace_ids() {
        let line = lines(&["--log-format", "json"], || {
            let span = tracing::info_span!("work", item = 7);
            assert!(span.is_disabled(), "at info a span costs nothing");
            let _entered = span.entered();
            tracing::info!(answer = 42, "done");
            tracing::debug!("not wanted");
        });
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["message"], "done");
        assert_eq!(object["answer"], 42);
        assert!(!line.contains("trace_id"), "{line}");
    }

    #[test]
    fn from_debug_on_lines_say_in_which_span_they_are() {
        let text = lines(&["--log", "debug"], || {
            let _entered = tracing::info_span!("work", item = 7).entered();
            tracing::debug!("seen");
        });
        assert!(text.contains("work{item=7}"), "{text}");
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        assert!(Program::try_parse_from(["program", "--trace-sample", "1.5"]).is_err());
        assert!(Program::try_parse_from(["program", "--log-format", "xml"]).is_err());
        let args = TelemetryArgs { log: "no=such=level".to_owned(), ..Default::default() };
        assert!(subscriber(&args, std::io::sink, false, None).is_err());
        let error = exporting("https://collector:4317", 1.0, "seckill").unwrap_err();
        assert!(error.to_string().contains("must be http://"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_last_spans_reach_the_collector_before_the_stop() {
        use http_body_util::BodyExt;
        let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
        let collect = move |request: axum::extract::Request| async move {
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let _ = sender.send((path, body));
            // An empty message, as gRPC frames it; its missing trailers do not matter for what is shown here.
            ([("content-type", "application/grpc")], vec![0_u8; 5])
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async { axum::serve(listener, axum::Router::new().fallback(collect)).await });

        let provider = exporting(&endpoint, 1.0, "seckill").unwrap();
        let written = Written::default();
        let writer = written.clone();
        let args = TelemetryArgs::default();
        let subscriber = subscriber(&args, move || writer.clone(), false, Some(&provider)).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("the last span", trace_id = tracing::field::Empty);
            span.record("trace_id", trace_id(&span));
            span.in_scope(|| tracing::info!("done"));
        });
        Guard { provider: Some(provider) }.shutdown().await;

        let (path, body) = received.recv().await.unwrap();
        assert_eq!(path, "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
        let has = |text: &[u8]| body.windows(text.len()).any(|window| window == text);
        assert!(has(b"the last span") && has(b"service.name") && has(b"seckill"));
        // And the log line leads to it.
        let lines = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        assert!(lines.contains("trace_id="), "{lines}");
        server.abort();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_that_is_away_does_not_hold_up_the_stop() {
        // A bound port that nobody answers on: the connection is accepted by the kernel and stays silent.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let provider = exporting(&endpoint, 1.0, "seckill").unwrap();
        let tracer = provider.tracer("test");
        drop(opentelemetry::trace::Tracer::start(&tracer, "span"));
        let started = std::time::Instant::now();
        Guard { provider: Some(provider) }.shutdown().await;
        assert!(started.elapsed() < FLUSH_LIMIT * 2, "{:?}", started.elapsed());
    }
}
