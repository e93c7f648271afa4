//! Sales: creating, listing, the operators' verbs and their stock, and what the gateways are told.

use std::time::Duration;

use mesh::testing::eventually;
use prost::Message as _;
use proto::{
    Error, Reason, RequestId, SaleId,
    filter::Filter,
    internal::SaleChanged,
    subjects,
    v1::{
        AdjustStockRequest, Availability, CloseSaleRequest, CreateSaleRequest, GetSaleRequest, ListSalesRequest,
        OpenSaleRequest, PauseSaleRequest, Sale, SaleState,
    },
};

use stock_svc::{domain::sale::Verb, store::Store};

use crate::world::*;

async fn create(world: &World, request: &CreateSaleRequest) -> Result<Sale, Error> {
    Ok(world.client.clone().create_sale(request.clone()).await?.into_inner())
}

async fn adjust(
    world: &World,
    sale: &SaleId,
    delta: i64,
    request: &RequestId,
) -> Result<proto::v1::StockReport, Error> {
    let request =
        AdjustStockRequest { sale: sale.to_string(), delta, request_id: request.to_string(), ..Default::default() };
    Ok(world.client.clone().adjust_stock(request).await?.into_inner())
}

#[tokio::test]
async fn a_creation_repeated_is_one_sale_and_another_payload_is_refused() {
    for world in worlds().await {
        let id = SaleId::generate(&RequestId::random()).to_string();
        let request = CreateSaleRequest {
            sale_id: id.clone(),
            description: "ß 😀".to_owned(),
            list_price: Some(proto::WireMoney { currency_code: "EUR".to_owned(), units: 29, nanos: 0 }),
            ..create_request(7)
        };
        let sale = create(&world, &request).await.unwrap();
        assert_eq!(sale.name, format!("sales/{id}"), "{}", world.name);
        assert_eq!((sale.state(), sale.availability()), (SaleState::Open, Availability::Available), "{}", world.name);
        assert_eq!(create(&world, &request).await.unwrap(), sale, "{}", world.name);
        let other = CreateSaleRequest { stock: 8, ..request.clone() };
        assert_eq!(create(&world, &other).await.unwrap_err().reason, Reason::RequestIdReused, "{}", world.name);
        let taken = CreateSaleRequest { request_id: RequestId::random().to_string(), ..request.clone() };
        let taken = create(&world, &taken).await.unwrap_err();
        assert_eq!(taken.field.as_deref(), Some("sale_id"), "{}", world.name);
        let priceless = CreateSaleRequest { price: None, ..create_request(7) };
        assert_eq!(create(&world, &priceless).await.unwrap_err().field.as_deref(), Some("price"), "{}", world.name);
        let mut client = world.client.clone();
        assert_eq!(client.get_sale(GetSaleRequest { sale: id.clone() }).await.unwrap().into_inner(), sale);
        let absent = client.get_sale(GetSaleRequest { sale: "absent".to_owned() }).await.unwrap_err();
        assert_eq!(Error::from(absent).reason, Reason::NotFound, "{}", world.name);
    }
}

#[tokio::test]
async fn sales_are_listed_by_id_in_pages() {
    for world in worlds().await {
        let mut ids = Vec::new();
        for _ in 0..5 {
            ids.push(world.sale(1, 1).await.name());
        }
        ids.sort();
        let (mut listed, mut token) = (Vec::new(), String::new());
        loop {
            let request = ListSalesRequest { page_size: 2, page_token: token };
            let page = world.client.clone().list_sales(request).await.unwrap().into_inner();
            assert!(page.sales.len() <= 2, "{}", world.name);
            listed.extend(page.sales.into_iter().map(|sale| sale.name));
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(listed, ids, "{}", world.name);
        for (page_size, page_token, field) in [(-1, "", "page_size"), (101, "", "page_size"), (1, "!", "page_token")] {
            let request = ListSalesRequest { page_size, page_token: page_token.to_owned() };
            let error = Error::from(world.client.clone().list_sales(request).await.unwrap_err());
            assert_eq!(error.field.as_deref(), Some(field), "{}", world.name);
        }
    }
}

#[tokio::test]
async fn a_paused_sale_goes_on_and_a_closed_one_never_does() {
    for world in worlds().await {
        let sale = world.sale(3, 1).await;
        let name = || sale.to_string();
        let mut client = world.client.clone();
        let held = wanted(&sale, "alice", 1);
        hold(&client, &held).await;
        for _ in 0..2 {
            let paused =
                client.pause_sale(PauseSaleRequest { sale: name(), ..Default::default() }).await.unwrap().into_inner();
            assert_eq!(paused.state(), SaleState::Paused, "{}", world.name);
        }
        let other = wanted(&sale, "bob", 1);
        assert_eq!(acquire(&client, &other).await, Got::Refused(Reason::SalePaused), "{}", world.name);
        assert!(matches!(acquire(&client, &held).await, Got::Granted(_)), "{}: what is held stays", world.name);
        let opened =
            client.open_sale(OpenSaleRequest { sale: name(), ..Default::default() }).await.unwrap().into_inner();
        assert_eq!(opened.state(), SaleState::Open, "{}", world.name);
        hold(&client, &other).await;
        for _ in 0..2 {
            let closed =
                client.close_sale(CloseSaleRequest { sale: name(), ..Default::default() }).await.unwrap().into_inner();
            assert_eq!(closed.state(), SaleState::Ended, "{}", world.name);
        }
        let late = acquire(&client, &wanted(&sale, "carol", 1)).await;
        assert_eq!(late, Got::Refused(Reason::SaleEnded), "{}", world.name);
        let reopened =
            Error::from(client.open_sale(OpenSaleRequest { sale: name(), ..Default::default() }).await.unwrap_err());
        assert_eq!(reopened.reason, Reason::IllegalState, "{}", world.name);
        assert_eq!(deduct(&client, &held).await, Ok(()), "{}: what is held can be paid", world.name);
    }
}

/// A store reads again only what it does not know: the stock, and the rest of a sale whose version has changed.
#[tokio::test]
async fn what_another_process_changes_of_a_sale_is_read() {
    for world in worlds().await {
        let sale = world.sale(5, 1).await;
        let (ours, theirs, now) = (world.store(), world.store(), world.clock.now_ms());
        let read = async || ours.sales(std::slice::from_ref(&sale)).await.unwrap().remove(0);
        assert_eq!(read().await.sale.verb, Verb::Open, "{}", world.name);
        for verb in [Verb::Paused, Verb::Open] {
            let changed = theirs.apply_verb(&sale, verb, now).await.unwrap();
            assert_eq!(changed.sale.verb, verb, "{}", world.name);
            assert_eq!(read().await, changed, "{}", world.name);
        }
        hold(&world.client, &wanted(&sale, "alice", 1)).await;
        let record = read().await;
        assert_eq!((record.ledger.available, record.ledger.held), (4, 1), "{}", world.name);
        assert!(ours.live_sales(now).await.unwrap().contains(&record), "{}", world.name);
    }
}

#[tokio::test]
async fn e9_stock_raised_mid_sale_reaches_buyers_once_and_is_not_lowered_below_what_is_held() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        hold(&world.client, &wanted(&sale, "alice", 1)).await;
        let request = RequestId::random();
        for _ in 0..3 {
            assert_eq!(adjust(&world, &sale, 3, &request).await.unwrap().total, 5, "{}", world.name);
        }
        assert_eq!(adjust(&world, &sale, 4, &request).await.unwrap_err().reason, Reason::RequestIdReused);
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.permits), (4, 4), "{}", world.name);
        let lower = adjust(&world, &sale, -5, &RequestId::random()).await.unwrap_err();
        assert_eq!(lower.reason, Reason::IllegalState, "{}", world.name);
        let request = RequestId::random();
        for _ in 0..2 {
            assert_eq!(adjust(&world, &sale, -4, &request).await.unwrap().total, 1, "{}", world.name);
        }
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.permits, report.held), (0, 0, 1), "{}", world.name);
        for (delta, field) in [(0, "delta"), (i64::MAX, "delta"), (1_000_000_000, "delta")] {
            let error = adjust(&world, &sale, delta, &RequestId::random()).await.unwrap_err();
            assert_eq!(error.field.as_deref(), Some(field), "{}", world.name);
        }
        assert_eq!(
            adjust(&world, &sale, i64::MIN, &RequestId::random()).await.unwrap_err().reason,
            Reason::IllegalState
        );
        // A grant on its way is spoken for, though the ledger still has its unit.
        let other = world.sale(1, 1).await;
        granted(&world.client, &wanted(&other, "bob", 1)).await;
        let lower = adjust(&world, &other, -1, &RequestId::random()).await.unwrap_err();
        assert_eq!(lower.reason, Reason::IllegalState, "{}", world.name);
    }
}

#[tokio::test]
async fn gateways_hear_when_a_sale_empties_who_is_in_it_and_when_units_come_back() {
    for world in worlds().await {
        let mut signals = world.bus.listen(subjects::SALES_CHANGED).await.unwrap();
        let sale = world.sale(1, 1).await;
        let mut versions = Vec::new();
        let mut next = async |wanted: Availability| {
            loop {
                let payload = tokio::time::timeout(Duration::from_secs(10), signals.recv()).await;
                let payload = payload.unwrap_or_else(|_| panic!("still waiting for {wanted:?}")).unwrap();
                let signal = SaleChanged::decode(payload).unwrap();
                versions.push(signal.version);
                if signal.sale.as_ref().unwrap().availability() == wanted {
                    return signal;
                }
            }
        };
        next(Availability::Available).await;
        let winner = wanted(&sale, "winner", 1);
        hold(&world.client, &winner).await;
        let signal = next(Availability::AllHeld).await;
        assert!(Filter::from_bytes(&signal.buyers).may_contain("winner"), "{}", world.name);
        assert!(!Filter::from_bytes(&signal.buyers).may_contain("somebody else"), "{}", world.name);
        // Told again while buyers come in vain.
        assert_eq!(acquire(&world.client, &wanted(&sale, "loser", 1)).await, Got::Refused(Reason::AllHeld));
        next(Availability::AllHeld).await;
        release(&world.client, &winner).await.unwrap();
        assert!(next(Availability::Available).await.buyers.is_empty(), "{}", world.name);
        let bought = wanted(&sale, "buyer", 1);
        hold(&world.client, &bought).await;
        deduct(&world.client, &bought).await.unwrap();
        let signal = next(Availability::SoldOut).await;
        assert!(Filter::from_bytes(&signal.buyers).may_contain("buyer"), "{}", world.name);
        assert!(versions.is_sorted_by(|a, b| a < b), "{}: {versions:?}", world.name);
        eventually("the sale shows it", async || {
            let request = GetSaleRequest { sale: sale.to_string() };
            let shown = world.client.clone().get_sale(request).await.unwrap().into_inner();
            (shown.availability() == Availability::SoldOut).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn what_reconciliation_would_find_is_told_and_a_ledger_that_does_not_add_up_is_seen() {
    use proto::v1::stock_reconciliation::Finding;
    use sea_orm::ConnectionTrait;
    for world in worlds().await {
        let sale = world.sale(5, 2).await;
        let (alice, bob) = (wanted(&sale, "alice", 2), wanted(&sale, "bob", 1));
        hold(&world.client, &alice).await;
        hold(&world.client, &bob).await;
        deduct(&world.client, &bob).await.unwrap();
        let ask = async || {
            let request = proto::v1::ReconcileStockRequest { sale: sale.to_string() };
            let found = world.client.clone().reconcile_stock(request).await.unwrap().into_inner();
            (found.finding(), found.units, found.locked_in_holds, found.sold_in_holds)
        };
        assert_eq!(ask().await, (Finding::Consistent, 0, 2, 1), "{}", world.name);
        let forge = format!("UPDATE stock_hold SET quantity = 1 WHERE hold_id = '{}'", alice.hold);
        world.connection.execute_unprepared(&forge).await.unwrap();
        assert_eq!(ask().await, (Finding::LedgerBroken, 1, 1, 1), "{}", world.name);
    }
}
