//! Trace context on its way through the mesh: W3C `traceparent` and `tracestate`, no baggage.
//!
//! A call continues the caller's trace ([`set_parent`]). A message that is consumed in a batch does not: the batch has
//! many producers and belongs to none of them, so its span is [`link`]ed to each. Without an exporter nothing has a
//! trace id, nothing is injected, and reading costs one failed lookup.

use std::collections::BTreeMap;

use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// Headers that can carry trace context.
pub trait Carrier {
    /// The header's value, where it is text.
    fn read(&self, name: &str) -> Option<&str>;
    /// Sets a header. What is no legal header value is left out.
    fn write(&mut self, name: &'static str, value: String);
}

impl Carrier for http::HeaderMap {
    fn read(&self, name: &str) -> Option<&str> {
        self.get(name)?.to_str().ok()
    }

    fn write(&mut self, name: &'static str, value: String) {
        if let Ok(value) = http::HeaderValue::try_from(value) {
            self.insert(name, value);
        }
    }
}

impl Carrier for MetadataMap {
    fn read(&self, name: &str) -> Option<&str> {
        self.get(name)?.to_str().ok()
    }

    fn write(&mut self, name: &'static str, value: String) {
        if let Ok(value) = AsciiMetadataValue::try_from(value) {
            self.insert(name, value);
        }
    }
}

/// The bus's headers.
impl Carrier for BTreeMap<String, String> {
    fn read(&self, name: &str) -> Option<&str> {
        self.get(name).map(String::as_str)
    }

    fn write(&mut self, name: &'static str, value: String) {
        self.insert(name.to_owned(), value);
    }
}

/// Writes where we are in the trace into the headers of what leaves. Nothing, when there is no trace.
pub fn inject_current(carrier: &mut impl Carrier) {
    // OpenTelemetry's own current context, and not the current span's: a span that is not traced, such as a
    // dependency's debug span, may lie between.
    Context::map_current(|context| {
        if context.span().span_context().is_valid() {
            TraceContextPropagator::new().inject_context(context, &mut Writing(carrier));
        }
    });
}

/// The caller's place in its trace; `None` when the headers carry none, or nonsense.
pub fn parent_of(carrier: &impl Carrier) -> Option<Context> {
    carrier.read(TRACEPARENT)?;
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &Reading(carrier));
    context.span().span_context().is_valid().then_some(context)
}

/// Makes the span a child of the caller's. Before the span is entered, or it has begun a trace of its own.
pub fn set_parent(span: &Span, carrier: &impl Carrier) {
    if !span.is_disabled()
        && let Some(parent) = parent_of(carrier)
    {
        // Fails only where spans are not traced, and then there is nothing to connect.
        let _ = span.set_parent(parent);
    }
}

/// Notes that the span also works for this producer, as written by [`current_traceparent`] or [`inject_current`].
pub fn link(span: &Span, traceparent: &str) {
    if !span.is_disabled()
        && let Some(producer) = parent_of(&Bare(traceparent))
    {
        span.add_link(producer.span().span_context().clone());
    }
}

/// Where we are in the trace as one string, to be stored beside what is done later. `None`, when there is no trace.
pub fn current_traceparent() -> Option<String> {
    let mut headers = BTreeMap::new();
    inject_current(&mut headers);
    headers.remove(TRACEPARENT)
}

/// The span's trace, for logs. `None`, when it is in none. Starts the span, so its parent must be set.
pub fn trace_id(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_valid().then(|| context.trace_id().to_string())
}

struct Writing<'a, C>(&'a mut C);

impl<C: Carrier> Injector for Writing<'_, C> {
    fn set(&mut self, name: &str, value: String) {
        match name {
            TRACEPARENT => self.0.write(TRACEPARENT, value),
            "tracestate" if !value.is_empty() => self.0.write("tracestate", value),
            _ => {}
        }
    }
}

struct Reading<'a, C>(&'a C);

impl<C: Carrier> Extractor for Reading<'_, C> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.read(name)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, "tracestate"]
    }
}

/// A `traceparent` without its header.
struct Bare<'a>(&'a str);

impl Carrier for Bare<'_> {
    fn read(&self, name: &str) -> Option<&str> {
        (name == TRACEPARENT).then_some(self.0)
    }

    fn write(&mut self, _: &'static str, _: String) {}
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::SpanId;

    use super::*;
    use crate::telemetry::kept;

    #[test]
    fn without_an_exporter_nothing_is_injected_and_nothing_breaks() {
        let span = tracing::info_span!("work");
        let _entered = span.enter();
        let mut headers = http::HeaderMap::new();
        inject_current(&mut headers);
        assert!(headers.is_empty());
        assert_eq!(current_traceparent(), None);
        link(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    }

    #[test]
    fn a_trace_goes_through_http_grpc_and_bus_headers() {
        let spans = kept::Spans::default();
        let _tracing = kept::tracing_into(&spans);

        let (mut http, mut grpc, mut bus) = (http::HeaderMap::new(), MetadataMap::new(), BTreeMap::new());
        tracing::info_span!("producer").in_scope(|| {
            // Not traced itself, and not in the way.
            let _between = tracing::debug_span!("between").entered();
            inject_current(&mut http);
            inject_current(&mut grpc);
            inject_current(&mut bus);
        });
        let producer = &spans.named("producer")[0];

        let follow = |carrier: &dyn Fn(&Span)| {
            let span = tracing::info_span!("consumer");
            carrier(&span);
            span.in_scope(|| {});
        };
        follow(&|span| set_parent(span, &http));
        follow(&|span| set_parent(span, &grpc));
        follow(&|span| set_parent(span, &bus));
        let consumers = spans.named("consumer");
        assert_eq!(consumers.len(), 3);
        for consumer in consumers {
            assert_eq!(consumer.span_context.trace_id(), producer.span_context.trace_id());
            assert_eq!(consumer.parent_span_id, producer.span_context.span_id());
        }
    }

    #[test]
    fn a_batch_is_linked_to_its_producers_and_child_of_none() {
        let spans = kept::Spans::default();
        let _tracing = kept::tracing_into(&spans);
        let produce = || tracing::info_span!("producer").in_scope(|| current_traceparent().unwrap());
        let parents = [produce(), produce()];

        let batch = tracing::info_span!("batch");
        for parent in &parents {
            link(&batch, parent);
        }
        link(&batch, "nonsense");
        batch.in_scope(|| {});
        drop(batch);

        let batch = &spans.named("batch")[0];
        assert_eq!(batch.parent_span_id, SpanId::INVALID);
        let linked: Vec<_> = batch.links.iter().map(|l| l.span_context.trace_id()).collect();
        let produced: Vec<_> = spans.named("producer").iter().map(|s| s.span_context.trace_id()).collect();
        assert_eq!(linked, produced);
    }
}
