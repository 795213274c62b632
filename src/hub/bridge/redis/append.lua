-- Judges, numbers, keeps and sends a batch. One step: nothing of Redis happens in between.
-- KEYS 1 meta, 2 stream, 3 marks, 4 seen, 5 answer of this hub, 6 lease, 7 sizes
-- ARGV 1 hub, 2 number, 3 known epoch, 4 known head, 5 fresh epoch, 6 records to keep, 7 largest live message,
--      8 live channel, 9 emitters to remember, 10 bytes to keep, 11 seconds to keep (0: no limit),
--      then for each entry: kind, emitter, session, x, y, count, records
local hub, number, remember = ARGV[1], ARGV[2], tonumber(ARGV[9])

local function text(n) return string.format('%.0f', n) end

-- Seqs have 64 bits, numbers here have 53: seqs are compared as decimals without leading zeros.
local function larger(a, b)
  if #a ~= #b then return #a > #b and a or b end
  return a > b and a or b
end

local given = redis.call('GET', KEYS[5])
local late = false
if given then
  local last, answer = given:match('^(%d+) (.*)$')
  if last == number then return answer end
  late = tonumber(last) > tonumber(number)
end

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'head', 'bytes')
local epoch, head, bytes = meta[1], tonumber(meta[2] or '0'), tonumber(meta[3] or '0')
if not late and (not epoch or (epoch == ARGV[3] and head < tonumber(ARGV[4]))) then
  epoch, head, bytes = ARGV[5], 0, 0
  redis.call('DEL', KEYS[2], KEYS[7])
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'head', '0', 'bytes', '0')
end

local marks = {}
local function mark(name)
  if marks[name] == nil then
    local stored = redis.call('HGET', KEYS[3], name)
    local session, have, of = (stored or ''):match('^(%S+) (%d+) (.*)$')
    marks[name] = session and { session = session, have = have, epoch = of } or false
  end
  return marks[name]
end

local judged, kept, count, changed = {}, {}, 0, {}
for i = 12, #ARGV, 7 do
  local kind, name, session, x, y = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local verdict = '0'
  if late then
    verdict = '0'
  elseif kind == 'turn' then
    local m = mark(name)
    if m and m.session == session and m.have == x then
      if y ~= x then
        m.have = y
        changed[name] = m
      end
      verdict = '1'
    end
  elseif kind == 'hello' then
    local m = mark(name)
    local have = larger(m and m.epoch == x and m.have or '0', y)
    verdict = have .. ',' .. (m and m.session or '')
    marks[name] = { session = session, have = have, epoch = x }
    changed[name] = marks[name]
  elseif kind == 'plain' or redis.call('GET', KEYS[6]) == hub then
    verdict = '1'
  end
  judged[#judged + 1] = verdict
  if verdict ~= '0' and ARGV[i + 5] ~= '0' then
    kept[#kept + 1] = ARGV[i + 6]
    count = count + tonumber(ARGV[i + 5])
  end
end

local now = tonumber(redis.call('TIME')[1])

-- The first offset that is kept. What an entry costs, and when it came, stands in a list beside the stream, whose entries
-- would have to be read for that. A new bound is reached step by step: nobody else is served meanwhile.
local function trim(last, added)
  local most, age = tonumber(ARGV[10]), tonumber(ARGV[11])
  local few = math.max(0, last - tonumber(ARGV[6]) + 1)
  local first = 0
  bytes = bytes + added
  for _ = 1, 1000 do
    local oldest = redis.call('LINDEX', KEYS[7], 0)
    if not oldest then
      bytes = added -- the newest is kept, however large it is
      break
    end
    local at, size, came = oldest:match('^(%d+) (%d+) (%d+)$')
    if tonumber(at) >= few and bytes <= most and (age == 0 or tonumber(came) >= now - age) then break end
    redis.call('LPOP', KEYS[7])
    bytes, first = bytes - tonumber(size), tonumber(at) + 1
  end
  return first
end

local receivers = 0
local last = head + count
if count > 0 then
  local records = #kept == 1 and kept[1] or table.concat(kept)
  -- Written first: Redis refuses for want of memory only what a script writes first.
  redis.call('XADD', KEYS[2], text(last) .. '-0', 'n', text(count), 'b', records)
  local first = trim(last, #records)
  if first > 0 then
    redis.call('XTRIM', KEYS[2], 'MINID', '~', text(first))
  end
  redis.call('RPUSH', KEYS[7], text(last) .. ' ' .. text(#records) .. ' ' .. text(now))
  redis.call('HSET', KEYS[1], 'head', text(last), 'bytes', text(bytes))
  local message
  if #records <= tonumber(ARGV[7]) then
    message = table.concat({ 'B', epoch, text(head + 1), text(count), hub, number }, ' ') .. '\n' .. records
  else
    message = table.concat({ 'H', epoch, text(last), hub, number }, ' ') .. '\n'
  end
  receivers = redis.call('PUBLISH', ARGV[8], message)
end

local added = 0
for name, m in pairs(changed) do
  added = added + redis.call('HSET', KEYS[3], name, m.session .. ' ' .. m.have .. ' ' .. m.epoch)
  redis.call('ZADD', KEYS[4], now, name)
end
if added > 0 then
  local over = redis.call('ZCARD', KEYS[4]) - remember
  if over > 0 then
    local forgotten = redis.call('ZPOPMIN', KEYS[4], over)
    for i = 1, #forgotten, 2 do redis.call('HDEL', KEYS[3], forgotten[i]) end
  end
end

local answer = table.concat({ epoch or '-', text(head + 1), text(count), receivers, table.concat(judged, ' ') }, ' ')
if not late then redis.call('SET', KEYS[5], number .. ' ' .. answer, 'EX', 7200) end
return answer
