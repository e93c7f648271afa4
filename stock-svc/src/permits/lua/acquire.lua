-- ARGV: now, then (hold, buyer, quantity) for each wish. Answers: R, then one text for each wish.
local now = tonumber(ARGV[1])
local header = redis.call('HMGET', HEADER, 'phase', 'epoch', 'free', 'granted', 'verb', 'start', 'stop', 'limit',
  'total', 'sold')
local open, epoch = header[1] == 'O', header[2]
local free, granted, verb = tonumber(header[3]), tonumber(header[4]), header[5]
local start, stop, limit = tonumber(header[6]), tonumber(header[7]), tonumber(header[8])
local total, sold = tonumber(header[9]), tonumber(header[10])
local taken = 0

local function acquire(hold, buyer, quantity)
  if not open then return 'U' end
  -- Before any stock check, or the retry of the last unit's winner would be told "sold out".
  local listed = redis.call('HGET', GRANTS, hold)
  if listed then
    local grant = parse_grant(listed)
    if grant.quantity == quantity and grant.buyer == buyer then return 'G' .. listed end
    return 'X'
  end
  if redis.call('HEXISTS', DONE, hold) == 1 then return 'D' end
  if verb == 'C' or now >= stop then return 'E' end
  if now < start then return 'S' end
  if verb == 'P' then return 'P' end
  local bought = redis.call('HGET', BUYERS, buyer)
  local units, last = 0, ''
  if bought then units, last = parse_bought(bought) end
  if units >= limit then return 'L' .. last end
  if units + quantity > limit then return 'O' end
  if free < quantity then
    if quantity > total - sold then return 'Z' end
    return 'A'
  end
  free = free - quantity
  granted = granted + quantity
  taken = taken + quantity
  local grant = epoch .. '|' .. int(quantity) .. '|' .. ARGV[1] .. '|' .. buyer
  redis.call('HSET', GRANTS, hold, grant)
  redis.call('ZADD', PENDING, ARGV[1], hold)
  redis.call('HSET', BUYERS, buyer, int(units + quantity) .. '|' .. hold)
  return 'F' .. grant
end

local results = { 0 }
for i = 2, #ARGV, 3 do
  results[#results + 1] = acquire(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]))
end
if taken > 0 then redis.call('HSET', HEADER, 'free', int(free), 'granted', int(granted)) end
results[1] = int(free or 0)
return results
