//! The names on the bus: streams, subjects, durable consumers and signals. A contract between services, like a .proto.

use std::time::Duration;

/// Accepted orders: each message starts a saga and is its deadline.
pub const ORDERS: &str = "ORDERS";
/// Outcomes of charges, from payment-svc.
pub const PAYMENTS: &str = "PAYMENTS";
/// What happened, for delivery and whoever else cares.
pub const EVENTS: &str = "EVENTS";

/// A stream, as whoever starts first makes it. Declared here alone: those who disagree would undo each other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Its name.
    pub name: &'static str,
    /// The pattern of subjects that it keeps.
    pub subject: &'static str,
    /// Messages older than this are dropped, consumed or not.
    pub kept_for: Duration,
}

/// A day longer than the longest payment window, so that no deadline is dropped unread.
const KEPT_FOR: Duration = Duration::from_secs(8 * 24 * 3600);

/// [`ORDERS`].
pub const ORDERS_STREAM: Stream = Stream { name: ORDERS, subject: ORDERS_PLACED_ALL, kept_for: KEPT_FOR };
/// [`PAYMENTS`].
pub const PAYMENTS_STREAM: Stream = Stream { name: PAYMENTS, subject: PAYMENTS_SETTLED, kept_for: KEPT_FOR };
/// [`EVENTS`].
pub const EVENTS_STREAM: Stream = Stream { name: EVENTS, subject: ORDERS_PAID, kept_for: KEPT_FOR };

/// Every accepted order, whatever its lane.
pub const ORDERS_PLACED_ALL: &str = "orders.placed.>";
/// Outcomes of charges.
pub const PAYMENTS_SETTLED: &str = "payments.settled";
/// Paid orders.
pub const ORDERS_PAID: &str = "orders.paid";

/// The consumer that turns accepted orders into locks. stock-svc reads its progress before it gives orphan grants
/// back and before it opens rebuilt permits.
pub const FUNNEL: &str = "funnel";
/// The coordinator's consumer of outcomes of charges.
pub const SETTLER: &str = "settler";

/// Signal: orders as they are now.
pub const ORDERS_CHANGED: &str = "signal.orders.changed";
/// Signal: a sale as it is now.
pub const SALES_CHANGED: &str = "signal.sales.changed";

/// The subject of accepted orders in the lane of this payment window.
pub fn orders_placed(window: Duration) -> String {
    format!("orders.placed.{}", window.as_millis())
}

/// The lane's own consumer.
pub fn lane(window: Duration) -> String {
    format!("lane-{}", window.as_millis())
}

/// The payment window of a lane's consumer; none for other consumers.
pub fn lane_window(consumer: &str) -> Option<Duration> {
    consumer.strip_prefix("lane-")?.parse().ok().map(Duration::from_millis)
}
